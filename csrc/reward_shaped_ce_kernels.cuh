// The reward-shaped cross entropy on a GPU in two passes: totals and top-k of a row in one read, the join of shards,
// the gradient. Compiles for CUDA and, with the functions of device.cuh from elsewhere, for the emulation in tests/.
#pragma once

#include "stretch.cuh"

namespace ptrl {

// One block per row, one read of it. With kRank, top_k is at most kMostFused<kThreads>.
// 1280 threads on a multiprocessor have 48 registers each; with two loads of 16 bytes on their way that is 40 KiB in
// flight, where an H200 should need about 25 (arithmetic, not measured).
template <class T, bool kEntropy, bool kRank, int kThreads>
__global__ void __launch_bounds__(kThreads, 1280 / kThreads)
    stats_kernel(Rows logits, Targets targets, int64_t vocab_start, int ranked, int top_k, float* numbers,
                 typename T::Raw* keys) {
  using Raw = typename T::Raw;
  using Shared = ScanShared<T, kRank, kThreads>;
  constexpr int kCount = kPerLoad<T>, kTile = kThreads * kCount;
  PTRL_SHARED(Shared, shared);

  const int64_t row = blockIdx.x;
  const int columns = (int)logits.columns, thread = threadIdx.x;
  float* out = numbers + row * kNumbers;
  Raw* list = keys + row * top_k;
  if (targets.skip(row)) {
    if (thread < kNumbers) out[thread] = thread == kMax ? -INFINITY : thread == kWidth ? columns : 0;
    for (int i = thread; i < top_k; i += kThreads) list[i] = 0;
    return;
  }
  const Raw* z_row = reinterpret_cast<const Raw*>(logits[row]);
  const bool aligned = is_aligned(z_row);
  Loaded next = load<T>(z_row, thread * kCount, columns, aligned);
  const auto fetch = [&](int tile) {
    const Loaded now = next;
    // Asked for before this tile is worked on: the sums and the barriers hide part of the way to memory.
    if ((tile + 1) * (int64_t)kTile < columns)
      next = load<T>(z_row, (tile + 1) * kTile + thread * kCount, columns, aligned);
    return now;
  };
  const Stretch whole(columns, ranked, targets.ids[row] - vocab_start);
  scan<T, kEntropy, kRank, kThreads>(shared, z_row, whole, top_k, out, list, fetch);
}

// One warp per row.
template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads, 2)
    combine_kernel(const float* numbers, const typename T::Raw* keys, Targets targets, int shards, int64_t rows, int k,
                   Shaping shaping, float* loss, float* coefficients, float* stats) {
  const int64_t row = blockIdx.x * (int64_t)(kThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= rows) return;
  if (targets.skip(row)) {
    if (lane == 0) loss[row] = 0;
    if (lane < kCoefficients) coefficients[row * kCoefficients + lane] = 0;
    if (lane < kStats) stats[lane * rows + row] = 0;
    return;
  }
  join<T>(numbers + row * kNumbers, rows * kNumbers, keys + row * k, rows * k, shards, k, targets.ids[row], shaping,
          loss + row, coefficients + row * kCoefficients, stats + row, rows);
}

constexpr int kLoadsPerThread = 4;  // of the gradient kernel

// `grad` may be the logits themselves. A block writes one of `tiles` stretches of a row.
template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads)
    grad_kernel(Rows logits, Rows grad, Targets targets, const float* grad_loss, const float* coefficients,
                int64_t vocab_start, int ranked, int tiles) {
  using Raw = typename T::Raw;
  constexpr int kCount = kPerLoad<T>, kTile = kThreads * kCount;
  const int64_t row = blockIdx.x / tiles;
  const int columns = (int)logits.columns;
  const Raw* z_row = reinterpret_cast<const Raw*>(logits[row]);
  Raw* g_row = reinterpret_cast<Raw*>(grad[row]);
  const bool aligned = is_aligned(z_row) && is_aligned(g_row);

  const Gradient gradient(coefficients + row * kCoefficients, grad_loss[row]);
  const Stretch whole(columns, ranked, targets.ids[row] - vocab_start);

  const int begin = (int)(blockIdx.x % tiles) * kLoadsPerThread * kTile + threadIdx.x * kCount;
  // All on their way before the first is used: a store might be to what a later load reads, so none moves ahead of it.
  Loaded loaded[kLoadsPerThread];
#pragma unroll
  for (int i = 0; i < kLoadsPerThread; i++) loaded[i] = load<T>(z_row, begin + i * kTile, columns, aligned);
#pragma unroll
  for (int i = 0; i < kLoadsPerThread; i++) {
    const int first = begin + i * kTile;
    float z[kCount];
    unpack<T>(loaded[i], z);
    gradient.write_over(z, first, whole);
    store<T>(g_row, first, columns, aligned, z);
  }
}

}  // namespace ptrl
