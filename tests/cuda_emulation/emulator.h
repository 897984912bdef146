// Runs CUDA kernels on a CPU to find errors in them, not to be fast: the thread blocks of a launch one after the other,
// every thread a fibre of its own.
//
// Barriers, votes, shuffles and warp sums are meetings: a fibre that reaches one waits until all of its warp or block
// have come. To make mistakes show,
//   - fibres run in a random order, whole warps rest while others go on, and an atomic operation may be interrupted, so
//     that a missing barrier shows as a result that depends on the seed;
//   - shared memory is a fresh heap block for each thread block, filled with NaN patterns, so that what is read before
//     it is written is noticed, and with AddressSanitizer what lies outside of it;
//   - a meeting that some threads miss, or for which they come to different calls, is an exception.
// Not there: clusters, asynchronous copies, the memory model (between two meetings a fibre sees every earlier write of
// the others), warps in lockstep, time.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define PTRL_SHARED(Type, name) Type& name = *static_cast<Type*>(emulation::block->shared_memory(sizeof(Type)))

namespace emulation {

inline std::mt19937 chance{0};

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// What the threads that meet have come for.
enum class Call { kNothing, kBarrier, kCount, kShuffle, kBallot, kSum };

constexpr size_t kStack = 64 * 1024;
inline std::vector<std::unique_ptr<char[]>> stacks;  // kept from block to block

struct Fibre {
  ucontext_t context;
  Call call;       // kNothing: can run
  bool done;
  uint64_t offer;  // what it brings to the meeting
};

class Block {
 public:
  Block(int64_t index, int threads, const std::function<void()>& kernel)
      : index(index), kernel_(kernel), fibres_(threads), met_(threads) {
    if (threads % 32 != 0) throw std::runtime_error("a block of incomplete warps");
  }

  void run() {
    while (stacks.size() < fibres_.size()) stacks.emplace_back(new char[kStack]);
    for (size_t i = 0; i < fibres_.size(); i++) {
      Fibre& fibre = fibres_[i];
      fibre.call = Call::kNothing;
      fibre.done = false;
      getcontext(&fibre.context);
      fibre.context.uc_stack = {stacks[i].get(), 0, kStack};
      fibre.context.uc_link = nullptr;
      makecontext(&fibre.context, &Block::enter, 0);
    }
    std::vector<int> order(fibres_.size());
    for (size_t i = 0; i < order.size(); i++) order[i] = (int)i;
    while (!std::all_of(fibres_.begin(), fibres_.end(), [](const Fibre& fibre) { return fibre.done; })) {
      std::shuffle(order.begin(), order.end(), chance);
      const uint32_t resting = (uint32_t)chance();  // a bit for each warp
      bool moved = false;
      for (const int i : order) {
        if (fibres_[i].done || fibres_[i].call != Call::kNothing) continue;
        moved = true;
        if (resting >> (i / 32) & 1) continue;
        current = i;
        swapcontext(&scheduler_, &fibres_[i].context);
      }
      for (size_t warp = 0; warp < fibres_.size(); warp += 32) moved |= meet(warp, 32, false);
      moved |= meet(0, fibres_.size(), true);
      if (!moved) throw std::runtime_error("some threads wait for others that never come");
    }
  }

  // Returns when all of the warp, or of the block, have come for the same call; `met` then has what they brought.
  void meet(Call call, uint64_t offer) {
    Fibre& self = fibres_[current];
    self.call = call;
    self.offer = offer;
    swapcontext(&self.context, &scheduler_);
  }
  uint64_t met(int thread) const { return met_[thread]; }
  int threads() const { return (int)fibres_.size(); }

  void maybe_interrupt() {
    if (chance() % 2 == 0) swapcontext(&fibres_[current].context, &scheduler_);
  }

  void* shared_memory(size_t size) {
    if (!shared_) {
      shared_.reset(new (std::align_val_t(64)) char[size]);
      std::memset(shared_.get(), 0xff, size);
    }
    return shared_.get();
  }

  const int64_t index;
  int current = 0;

 private:
  struct Free {
    void operator()(char* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
  };

  static void enter();

  static bool of_block(Call call) { return call == Call::kBarrier || call == Call::kCount; }

  // Lets the threads go on if all of them are there.
  bool meet(size_t first, size_t count, bool whole_block) {
    Call call = Call::kNothing;
    size_t come = 0, done = 0;
    for (size_t i = first; i < first + count; i++) {
      done += fibres_[i].done;
      if (fibres_[i].done || fibres_[i].call == Call::kNothing || of_block(fibres_[i].call) != whole_block) continue;
      if (come++ > 0 && fibres_[i].call != call) throw std::runtime_error("threads meet in different calls");
      call = fibres_[i].call;
    }
    if (come == 0) return false;
    if (done > 0) throw std::runtime_error("a finished thread is waited for");
    if (come < count) return false;
    for (size_t i = first; i < first + count; i++) {
      met_[i] = fibres_[i].offer;
      fibres_[i].call = Call::kNothing;
    }
    return true;
  }

  const std::function<void()>& kernel_;
  std::vector<Fibre> fibres_;
  std::vector<uint64_t> met_;
  std::unique_ptr<char[], Free> shared_;
  ucontext_t scheduler_;
};

inline Block* block = nullptr;

inline void Block::enter() {
  block->kernel_();
  block->fibres_[block->current].done = true;
  swapcontext(&block->fibres_[block->current].context, &block->scheduler_);
}

inline int first_of_warp() { return block->current / 32 * 32; }

struct ThreadIndex {
  struct {
    operator int() const { return block->current; }
  } x;
};
struct BlockIndex {
  struct {
    operator int64_t() const { return block->index; }
  } x;
};

}  // namespace emulation

inline const emulation::ThreadIndex threadIdx{};
inline const emulation::BlockIndex blockIdx{};

inline void __syncthreads() { emulation::block->meet(emulation::Call::kBarrier, 0); }

inline int __syncthreads_count(int predicate) {
  emulation::block->meet(emulation::Call::kCount, predicate != 0);
  int count = 0;
  for (int i = 0; i < emulation::block->threads(); i++) count += (int)emulation::block->met(i);
  return count;
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  uint64_t offer = 0;
  std::memcpy(&offer, &value, sizeof value);
  const int source = emulation::block->current ^ mask;
  emulation::block->meet(emulation::Call::kShuffle, offer);
  offer = emulation::block->met(source);
  std::memcpy(&value, &offer, sizeof value);
  return value;
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  const int source = emulation::first_of_warp() + lane;
  return __shfl_xor_sync(~0u, value, emulation::block->current ^ source);
}

inline unsigned __ballot_sync(unsigned, int predicate) {
  emulation::block->meet(emulation::Call::kBallot, predicate != 0);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; lane++)
    votes |= (unsigned)emulation::block->met(emulation::first_of_warp() + lane) << lane;
  return votes;
}

inline unsigned __reduce_add_sync(unsigned, unsigned value) {
  emulation::block->meet(emulation::Call::kSum, value);
  unsigned sum = 0;
  for (int lane = 0; lane < 32; lane++) sum += (unsigned)emulation::block->met(emulation::first_of_warp() + lane);
  return sum;
}

template <class T>
T atomicAdd(T* address, T value) {
  emulation::block->maybe_interrupt();
  const T before = *address;
  *address += value;
  emulation::block->maybe_interrupt();
  return before;
}

inline float __uint_as_float(uint32_t u) { return emulation::bits<float>(u); }
inline uint32_t __float_as_uint(float x) { return emulation::bits<uint32_t>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
using std::max;
using std::min;

namespace ptrl {

struct Stream {};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, Stream, const Arguments&... arguments) {
  const std::function<void()> bound = [&] { kernel(arguments...); };
  for (int64_t i = 0; i < blocks; i++) {
    emulation::Block block(i, threads, bound);
    emulation::block = &block;
    block.run();
  }
}

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return std::fpclassify(y) == FP_SUBNORMAL ? 0 : y;
}

inline uint16_t round_to_bfloat16(float x) {
  const uint32_t u = __float_as_uint(x);
  return (uint16_t)(std::isnan(x) ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline uint32_t pack_bfloat16(float low, float high) {
  return round_to_bfloat16(low) | (uint32_t)round_to_bfloat16(high) << 16;
}
inline uint32_t pack_half(float low, float high) {
  return emulation::bits<uint16_t>((_Float16)low) | (uint32_t)emulation::bits<uint16_t>((_Float16)high) << 16;
}
inline float half_to_float(uint16_t raw) { return (float)emulation::bits<_Float16>(raw); }

}  // namespace ptrl
