// What the kernels ask of CUDA and of csrc/device.cuh, answered by the emulation.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator.h"

namespace emulation {

inline int first_of_warp() { return cluster->thread() / 32 * 32; }

struct ThreadIndex {
  struct {
    operator int() const { return cluster->thread(); }
  } x;
};
struct BlockIndex {
  struct {
    operator int64_t() const { return cluster->block(); }
  } x;
};

}  // namespace emulation

inline const emulation::ThreadIndex threadIdx{};
inline const emulation::BlockIndex blockIdx{};

inline void __syncthreads() { emulation::cluster->meet(emulation::Call::kBarrier, 0); }

inline int __syncthreads_count(int predicate) {
  emulation::cluster->meet(emulation::Call::kCount, predicate != 0);
  int count = 0;
  for (int i = 0; i < emulation::cluster->threads(); i++) count += (int)emulation::cluster->met(i);
  return count;
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  uint64_t offer = 0;
  std::memcpy(&offer, &value, sizeof value);
  const int source = emulation::cluster->thread() ^ mask;
  emulation::cluster->meet(emulation::Call::kShuffle, offer);
  offer = emulation::cluster->met(source);
  std::memcpy(&value, &offer, sizeof value);
  return value;
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  const int source = emulation::first_of_warp() + lane;
  return __shfl_xor_sync(~0u, value, emulation::cluster->thread() ^ source);
}

inline unsigned __ballot_sync(unsigned, int predicate) {
  emulation::cluster->meet(emulation::Call::kBallot, predicate != 0);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; lane++)
    votes |= (unsigned)emulation::cluster->met(emulation::first_of_warp() + lane) << lane;
  return votes;
}

inline unsigned __reduce_add_sync(unsigned, unsigned value) {
  emulation::cluster->meet(emulation::Call::kSum, value);
  unsigned sum = 0;
  for (int lane = 0; lane < 32; lane++) sum += (unsigned)emulation::cluster->met(emulation::first_of_warp() + lane);
  return sum;
}

template <class T>
T atomicAdd(T* address, T value) {
  emulation::cluster->maybe_interrupt();
  const T before = *address;
  *address += value;
  emulation::cluster->maybe_interrupt();
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
void launch_clusters(void (*kernel)(Parameters...), int64_t clusters, int blocks, int threads, int64_t dynamic_size,
                     Stream, const Arguments&... arguments) {
  const std::function<void()> bound = [&] { kernel(arguments...); };
  for (int64_t i = 0; i < clusters; i++) {
    emulation::Cluster cluster(i * blocks, blocks, threads, dynamic_size, bound);
    emulation::cluster = &cluster;
    cluster.run();
  }
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, Stream stream, const Arguments&... arguments) {
  launch_clusters(kernel, blocks, 1, threads, 0, stream, arguments...);
}

// Of an H100, where the kernel itself declares this much.
template <class Kernel>
int64_t room_in_cluster(Kernel*, int64_t declared) {
  return 232448 - declared;
}

inline void cluster_arrive() { emulation::cluster->arrive(); }
inline void cluster_wait() { emulation::cluster->wait(); }
template <class T>
T* peer(T* mine, int block) {
  return static_cast<T*>(emulation::cluster->peer(mine, block));
}

inline void copy_16_bytes(void* to, const void* from) { emulation::cluster->copy(to, from, 16); }
inline void close_copies() { emulation::cluster->close_copies(); }
template <int kOpen>
void wait_for_copies() {
  emulation::cluster->wait_for_copies(kOpen);
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
