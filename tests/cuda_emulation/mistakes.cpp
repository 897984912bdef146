// Kernels with one mistake each, for the test that the emulation shows it.
#include "emulator.h"

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

}  // namespace

extern "C" const char* run(int which, unsigned seed, int* out) {
  static std::string message;
  void (*const kernels[])(int*) = {exchange<true>, exchange<false>, miss_a_barrier, wait_for_a_finished_thread,
                                   meet_in_different_calls};
  emulation::chance.seed(seed);
  try {
    ptrl::launch(kernels[which], 1, kThreads, ptrl::Stream{}, out);
    return nullptr;
  } catch (const std::runtime_error& error) {
    message = error.what();
    return message.c_str();
  }
}
