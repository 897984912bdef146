// Runs CUDA kernels on a CPU to find errors in them, not to be fast: the thread blocks of a launch one after the other,
// those of a cluster together, every thread a fibre of its own.
//
// Barriers, votes, shuffles and warp sums are meetings: a fibre that reaches one waits until all of its warp, block or
// cluster have come. To make mistakes show,
//   - fibres run in a random order, whole warps and blocks rest while others go on, and an atomic operation may be
//     interrupted, so that a missing barrier shows as a result that depends on the seed;
//   - shared memory is a fresh heap block for each thread block, filled with NaN patterns, so that what is read before
//     it is written is noticed, and with AddressSanitizer what lies outside of it; it is filled so again when the block
//     ends, and to end without a cluster barrier behind the last look at a peer's is an exception;
//   - what is copied asynchronously arrives only when it is waited for;
//   - a meeting that some threads miss, or for which they come to different calls, is an exception.
// Not there: bulk copies, the memory model (between two meetings a fibre sees every earlier write of the others), warps
// in lockstep, time.
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
#define PTRL_SHARED(Type, name) Type& name = *static_cast<Type*>(emulation::cluster->shared_memory(sizeof(Type)))
#define PTRL_DYNAMIC_SHARED(Type, name) Type* name = static_cast<Type*>(emulation::cluster->dynamic_memory())

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
enum class Call { kNothing, kShuffle, kBallot, kSum, kBarrier, kCount, kCluster };
enum class Scope { kWarp, kBlock, kCluster };

inline Scope scope_of(Call call) {
  return call == Call::kCluster ? Scope::kCluster : call >= Call::kBarrier ? Scope::kBlock : Scope::kWarp;
}

constexpr size_t kStack = 64 * 1024;
inline std::vector<std::unique_ptr<char[]>> stacks;  // kept from cluster to cluster

struct Copy {
  void* to;
  const void* from;
  size_t size;
  int group;
};

struct Fibre {
  ucontext_t context;
  Call call = Call::kNothing;  // then it can run
  bool done = false;
  uint64_t offer = 0;         // what it brings to the meeting
  int arrived = 0, left = 0;  // cluster barriers
  bool looks_at_peers = false;
  std::vector<Copy> copies;  // on their way
  int groups = 0;            // of copies, closed
};

// Heap memory of a block, full of NaN patterns.
class SharedMemory {
 public:
  void allocate(size_t size) {
    memory_.reset(new (std::align_val_t(64)) char[size]);
    size_ = size;
    spoil();
  }
  void spoil() {
    if (size_ > 0) std::memset(memory_.get(), 0xff, size_);
  }
  char* get() const { return memory_.get(); }
  size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(char* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t size_ = 0;
};

// The blocks that run together, `first_block` and on; without clusters that is one.
class Cluster {
 public:
  Cluster(int64_t first_block, int blocks, int threads, size_t dynamic_size, const std::function<void()>& kernel)
      : first_block_(first_block),
        threads_(threads),
        kernel_(kernel),
        fibres_(blocks * threads),
        met_(blocks * threads),
        shared_(blocks),
        dynamic_(blocks) {
    if (threads % 32 != 0) throw std::runtime_error("a block of incomplete warps");
    for (SharedMemory& memory : dynamic_) memory.allocate(dynamic_size);
  }

  void run() {
    while (stacks.size() < fibres_.size()) stacks.emplace_back(new char[kStack]);
    for (size_t i = 0; i < fibres_.size(); i++) {
      ucontext_t& context = fibres_[i].context;
      getcontext(&context);
      context.uc_stack = {stacks[i].get(), 0, kStack};
      context.uc_link = nullptr;
      makecontext(&context, &Cluster::enter, 0);
    }
    std::vector<int> order(fibres_.size());
    for (size_t i = 0; i < order.size(); i++) order[i] = (int)i;
    while (!std::all_of(fibres_.begin(), fibres_.end(), [](const Fibre& fibre) { return fibre.done; })) {
      std::shuffle(order.begin(), order.end(), chance);
      const uint32_t resting = (uint32_t)chance(), away = blocks() > 1 ? (uint32_t)(chance() & chance()) : 0;
      bool moved = false;
      for (const int i : order) {
        if (fibres_[i].done || fibres_[i].call != Call::kNothing) continue;
        moved = true;
        if ((resting >> (i / 32 % 32) & 1) || (away >> (i / threads_ % 32) & 1)) continue;
        current_ = i;
        swapcontext(&scheduler_, &fibres_[i].context);
        if (error_) throw std::runtime_error(error_);
        if (fibres_[i].done) finish(i);
      }
      for (size_t warp = 0; warp < fibres_.size(); warp += 32) moved |= meet(warp, 32, Scope::kWarp);
      for (size_t first = 0; first < fibres_.size(); first += threads_) moved |= meet(first, threads_, Scope::kBlock);
      moved |= pass_cluster_barrier();
      if (!moved) throw std::runtime_error("some threads wait for others that never come");
    }
  }

  // Returns when all of the warp or of the block have come for the same call; `met` then has what they brought.
  void meet(Call call, uint64_t offer) {
    self().call = call;
    self().offer = offer;
    pause();
  }
  uint64_t met(int thread) const { return met_[current_ / threads_ * threads_ + thread]; }

  void arrive() {
    if (self().arrived++ > self().left) fail("a thread arrives twice at a cluster barrier");
    self().looks_at_peers = false;
  }
  void wait() {
    if (self().arrived == self().left) fail("a thread waits at a cluster barrier before it arrives");
    self().call = Call::kCluster;
    pause();
  }

  void copy(void* to, const void* from, size_t size) { self().copies.push_back({to, from, size, self().groups}); }
  void close_copies() { self().groups++; }
  void wait_for_copies(int open) {  // until only the last so many of the closed groups are on their way
    std::vector<Copy>& copies = self().copies;
    const auto late = std::find_if(copies.begin(), copies.end(),
                                   [&](const Copy& copy) { return copy.group >= self().groups - open; });
    for (auto copy = copies.begin(); copy != late; ++copy) std::memcpy(copy->to, copy->from, copy->size);
    copies.erase(copies.begin(), late);
  }

  void maybe_interrupt() {
    if (chance() % 2 == 0) pause();
  }

  void* shared_memory(size_t size) { return shared_of(current_ / threads_, size).get(); }
  void* dynamic_memory() { return dynamic_[current_ / threads_].get(); }
  // Where a block of the cluster has what this one has at `mine`.
  void* peer(const void* mine, int block) {
    const SharedMemory& own = shared_[current_ / threads_];
    const ptrdiff_t offset = static_cast<const char*>(mine) - own.get();
    if (block < 0 || block >= blocks() || offset < 0 || offset >= (ptrdiff_t)own.size())
      fail("no shared memory of the cluster");
    self().looks_at_peers |= blocks() > 1;
    return shared_of(block, own.size()).get() + offset;
  }

  int threads() const { return threads_; }
  int blocks() const { return (int)shared_.size(); }
  int thread() const { return current_ % threads_; }
  int64_t block() const { return first_block_ + current_ / threads_; }

 private:
  static void enter();

  Fibre& self() { return fibres_[current_]; }
  void pause() { swapcontext(&self().context, &scheduler_); }
  void fail(const char* error) {  // out of a fibre, which no exception can leave
    error_ = error;
    pause();
  }

  SharedMemory& shared_of(int block, size_t size) {
    if (shared_[block].size() == 0) shared_[block].allocate(size);
    return shared_[block];
  }

  void finish(int fibre) {
    const Fibre& it = fibres_[fibre];
    if (it.looks_at_peers) throw std::runtime_error("a block may end while a peer looks at its shared memory");
    if (it.arrived != it.left)
      throw std::runtime_error("a thread ends between arriving at a cluster barrier and waiting");
    if (!it.copies.empty()) throw std::runtime_error("a copy is not waited for");
    const auto first = fibres_.begin() + fibre / threads_ * threads_;
    if (!std::all_of(first, first + threads_, [](const Fibre& fibre) { return fibre.done; })) return;
    shared_[fibre / threads_].spoil();
    dynamic_[fibre / threads_].spoil();
  }

  // Lets the threads go on if all of them are there.
  bool meet(size_t first, size_t count, Scope scope) {
    Call call = Call::kNothing;
    size_t come = 0, done = 0;
    for (size_t i = first; i < first + count; i++) {
      done += fibres_[i].done;
      if (fibres_[i].done || fibres_[i].call == Call::kNothing || scope_of(fibres_[i].call) != scope) continue;
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

  // Arriving and waiting are apart: who waits goes on when all have arrived, wherever they are.
  bool pass_cluster_barrier() {
    bool moved = false;
    for (Fibre& waiting : fibres_) {
      if (waiting.call != Call::kCluster) continue;
      bool all = true;
      for (const Fibre& other : fibres_) {
        if (other.arrived > waiting.left) continue;
        if (other.done) throw std::runtime_error("a finished thread is waited for");
        all = false;
      }
      if (!all) return moved;
      waiting.call = Call::kNothing;
      waiting.left++;
      moved = true;
    }
    return moved;
  }

  const int64_t first_block_;
  const int threads_;
  const std::function<void()>& kernel_;
  std::vector<Fibre> fibres_;
  std::vector<uint64_t> met_;
  std::vector<SharedMemory> shared_, dynamic_;
  int current_ = 0;
  const char* error_ = nullptr;
  ucontext_t scheduler_;
};

inline Cluster* cluster = nullptr;

inline void Cluster::enter() {
  cluster->kernel_();
  cluster->self().done = true;
  cluster->pause();
}

}  // namespace emulation
