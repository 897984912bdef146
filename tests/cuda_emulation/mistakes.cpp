// Kernels with one mistake each, for the test that the emulation shows it.
#include "device.h"

#include <string>

namespace {

constexpr int kThreads = 64;

// Every thread's neighbour in the other warp, with and without the barrier that makes it right.
template <bool kBarrier>
void exchange(int* out) {
  struct Shared {
    int values[kThreads];
  };
  PTRL_SHARED(Shared, shared);
  shared.values[threadIdx.x] = threadIdx.x;
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = shared.values[threadIdx.x ^ 32];
}

void miss_a_barrier(int*) {
  if (threadIdx.x != 5) __syncthreads();
}

void wait_for_a_finished_thread(int* out) {
  if (threadIdx.x == 5) return;
  out[threadIdx.x] = __shfl_xor_sync(~0u, (int)threadIdx.x, 1);
}

void meet_in_different_calls(int* out) {
  out[threadIdx.x] = threadIdx.x < 16 ? (int)__ballot_sync(~0u, 1) : __shfl_xor_sync(~0u, 1, 1);
}

struct Value {
  int value;
};

// Every block's neighbour in the cluster, with and without the barriers that make it right.
template <bool kFirst, bool kLast>
void exchange_between_blocks(int* out) {
  PTRL_SHARED(Value, shared);
  if (threadIdx.x == 0) shared.value = (int)blockIdx.x;
  if (kFirst) {
    ptrl::cluster_arrive();
    ptrl::cluster_wait();
  }
  out[blockIdx.x] = *ptrl::peer(&shared.value, 1 - (int)blockIdx.x);
  if (kLast) {
    ptrl::cluster_arrive();
    ptrl::cluster_wait();
  }
}

void miss_a_cluster_barrier(int*) {
  if (blockIdx.x == 0) ptrl::cluster_arrive();
  if (blockIdx.x == 0) ptrl::cluster_wait();
}

void wait_without_arriving(int*) { ptrl::cluster_wait(); }
void arrive_without_waiting(int*) { ptrl::cluster_arrive(); }

// Reads the later of two copies, waited for in time, too late or never.
template <int kOpen, bool kFinally>
void copy_two(int* out) {
  struct Shared {
    int to[kThreads][2][4];
  };
  PTRL_SHARED(Shared, shared);
  const int from[4] = {(int)threadIdx.x};
  for (int i = 0; i < 2; i++) {
    ptrl::copy_16_bytes(shared.to[threadIdx.x][i], from);
    ptrl::close_copies();
  }
  ptrl::wait_for_copies<kOpen>();
  out[threadIdx.x] = shared.to[threadIdx.x][1][0];
  if (kFinally) ptrl::wait_for_copies<0>();
}

}  // namespace

extern "C" const char* run(int which, int blocks, unsigned seed, int* out) {
  static std::string message;
  void (*const kernels[])(int*) = {exchange<true>,
                                   exchange<false>,
                                   miss_a_barrier,
                                   wait_for_a_finished_thread,
                                   meet_in_different_calls,
                                   exchange_between_blocks<true, true>,
                                   exchange_between_blocks<false, true>,
                                   exchange_between_blocks<true, false>,
                                   miss_a_cluster_barrier,
                                   wait_without_arriving,
                                   arrive_without_waiting,
                                   copy_two<0, false>,
                                   copy_two<1, true>,
                                   copy_two<1, false>};
  emulation::chance.seed(seed);
  try {
    ptrl::launch_clusters(kernels[which], 1, blocks, kThreads, 0, ptrl::Stream{}, out);
    return nullptr;
  } catch (const std::runtime_error& error) {
    message = error.what();
    return message.c_str();
  }
}
