// The reward-shaped cross entropy on a GPU: totals and top-k of a row in one read, the join of shards, the gradient.
// Compiles for CUDA and, with the functions of device.cuh from elsewhere, for the emulation in tests/.
#pragma once

#include "logits.cuh"
#include "reward_shaped_ce.h"
#include "rows.h"
#include "top_k.cuh"

namespace ptrl {

// Of the logits that one thread has seen, relative to its maximum.
struct Sums {
  float max = -INFINITY, others = 0, padded = 0, weighted = 0;
};

template <bool kEntropy>
__device__ inline void rescale(Sums& sums, float max) {
  if (sums.max > -INFINITY) {  // else they are 0, or NaN
    const float shift = fmaxf(sums.max - max, kVanishing), scale = exp2_fast(shift * kLog2E);
    if (kEntropy) sums.weighted = scale * (sums.weighted + shift * (sums.others + sums.padded));
    sums.others *= scale;
    sums.padded *= scale;
  }
  sums.max = max;
}

// e^(z - max). The difference comes first: with one fused multiply-add the rounding of max log2 e would count.
template <bool kEntropy>
__device__ inline float exponential(float z, float max, float& weighted) {
  float x = z - max;
  if (kEntropy) x = x < kVanishing ? kVanishing : x;  // NaN stays, and 0 x inf does not arise
  const float e = exp2_fast(x * kLog2E);
  if (kEntropy) weighted += e * x;
  return e;
}

template <bool kEntropy, int kCount>
__device__ inline void add_inner(Sums& sums, const float (&z)[kCount]) {
  const float top = largest(z);
  if (top > sums.max) rescale<kEntropy>(sums, top);
  const float max = sums.max > -INFINITY ? sums.max : 0;
#pragma unroll
  for (int j = 0; j < kCount; j++) sums.others += exponential<kEntropy>(z[j], max, sums.weighted);
}

// The same where the target, padding or the end of the row is among these columns. What is not ranked becomes NaN, so
// that no comparison lets it through.
template <bool kEntropy, int kCount>
__device__ inline void add_edge(Sums& sums, float (&z)[kCount], int first, int ranked, int columns, int target) {
  const float top = largest(z);  // beyond the end there is -inf
  if (top > sums.max) rescale<kEntropy>(sums, top);
  const float max = sums.max > -INFINITY ? sums.max : 0;
#pragma unroll
  for (int j = 0; j < kCount; j++) {
    const int column = first + j;
    if (column < columns && column != target) {
      const float e = exponential<kEntropy>(z[j], max, sums.weighted);
      (column < ranked ? sums.others : sums.padded) += e;
    }
    if (column >= ranked) z[j] = NAN;
  }
}

template <int kThreads>
struct Reduction {
  float max[kThreads / 32];
  double others[kThreads / 32], padded[kThreads / 32], weighted[kThreads / 32];
};

// In a fixed order, so that the result is the same every time. Valid in thread 0.
template <bool kEntropy, int kThreads>
__device__ inline Totals block_totals(Sums sums, Reduction<kThreads>& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float top = sums.max;
  for (int mask = 16; mask > 0; mask /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, mask));
  if (lane == 0) shared.max[warp] = top;
  __syncthreads();
  for (int w = 0; w < kThreads / 32; w++) top = fmaxf(top, shared.max[w]);
  rescale<kEntropy>(sums, top);

  double others = sums.others, padded = sums.padded, weighted = sums.weighted;
  for (int mask = 16; mask > 0; mask /= 2) {
    others += __shfl_xor_sync(~0u, others, mask);
    padded += __shfl_xor_sync(~0u, padded, mask);
    if (kEntropy) weighted += __shfl_xor_sync(~0u, weighted, mask);
  }
  if (lane == 0) {
    shared.others[warp] = others;
    shared.padded[warp] = padded;
    shared.weighted[warp] = weighted;
  }
  __syncthreads();
  Totals totals;
  if (threadIdx.x > 0) return totals;
  totals.max = top;
  for (int w = 0; w < kThreads / 32; w++) {
    totals.others += shared.others[w];
    totals.padded += shared.padded[w];
    totals.weighted += shared.weighted[w];
  }
  return totals;
}

// One block per row, one read of it. With kRank, top_k is at most kMostFused<kThreads>.
// 1280 threads on a multiprocessor have 48 registers each; with two loads of 16 bytes on their way that is 40 KiB in
// flight, where an H200 should need about 25 (arithmetic, not measured).
template <class T, bool kEntropy, bool kRank, int kThreads>
__global__ void __launch_bounds__(kThreads, 1280 / kThreads)
    stats_kernel(Rows logits, Targets targets, int64_t vocab_start, int ranked, int top_k, float* numbers,
                 typename T::Raw* keys) {
  using Raw = typename T::Raw;
  constexpr int kCount = kPerLoad<T>, kTile = kThreads * kCount;
  struct Shared {
    Reduction<kThreads> reduction;
    Candidates<T, kRank ? kThreads : 32> candidates;
  };
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
  const int64_t column = targets.ids[row] - vocab_start;
  const int target = column >= 0 && column < columns ? (int)column : -1;

  Sums sums;
  TopK<T, kRank ? kThreads : 32> top(shared.candidates, top_k);
  if (kRank) top.begin();
  Loaded next = load<T>(z_row, thread * kCount, columns, aligned);
  for (int tile = 0; tile * (int64_t)kTile < columns; tile++) {
    const int first = tile * kTile + thread * kCount;
    float z[kCount];
    unpack<T>(next, z);
    // Asked for before this tile is worked on: the sums and the barriers hide part of the way to memory.
    if ((tile + 1) * (int64_t)kTile < columns) next = load<T>(z_row, first + kTile, columns, aligned);
    if (first + kCount <= ranked && (unsigned)(target - first) >= (unsigned)kCount)
      add_inner<kEntropy>(sums, z);
    else
      add_edge<kEntropy>(sums, z, first, ranked, columns, target);
    if (kRank) top.consider(tile, z);
  }

  const Totals totals = block_totals<kEntropy>(sums, shared.reduction);
  const int ties = kRank ? top.finish(list) : 0;
  if (thread > 0) return;
  out[kMax] = (float)totals.max;
  out[kOthers] = (float)totals.others;
  out[kPadded] = (float)totals.padded;
  out[kWeighted] = (float)totals.weighted;
  out[kTarget] = target < 0 ? 0 : T::to_float(z_row[target]);
  out[kTies] = (float)ties;
  out[kWidth] = (float)columns;
}

// The sum of e^(z - max) over the head without the target, and the smallest logit of the head, from the lists of all
// shards; a warp's work. `ties` says how many of a shard's logits are equal to the last of its list.
template <class T>
__device__ inline void head_of(const typename T::Raw* keys, int64_t stride, const float* numbers, int64_t number_stride,
                               int shards, int k, float max, float target, double& head, float& threshold) {
  using Key = typename T::Key;
  const int lane = threadIdx.x % 32;
  const auto at = [&](int shard, int i) { return T::to_float(keys[shard * stride + i]); };
  threshold = at(0, k - 1);
  if (shards > 1) {
    uint32_t found = 0;
    for (uint32_t bit = 1u << (8 * sizeof(Key) - 1); bit > 0; bit >>= 1) {
      int reached = 0;
      for (int shard = 0; shard < shards; shard++)
        for (int i = lane; i < k; i += 32) reached += key_of<T>(at(shard, i)) >= (found | bit);
      if ((int)__reduce_add_sync(~0u, (unsigned)reached) >= k) found |= bit;
    }
    threshold = T::to_float(raw_of<T>((Key)found));
  }

  double above = 0, tied = 0;
  int target_at = shards * k;  // any entry that equals the target will do for it
  for (int shard = 0; shard < shards; shard++)
    for (int i = lane; i < k; i += 32)
      if (at(shard, i) == target) target_at = min(target_at, shard * k + i);
  for (int mask = 16; mask > 0; mask /= 2) target_at = min(target_at, __shfl_xor_sync(~0u, target_at, mask));
  for (int shard = 0; shard < shards; shard++) {
    // A list that ends in the threshold may stand for more of it than it had room for.
    const bool counted = at(shard, k - 1) == threshold;
    if (counted && lane == 0) tied += numbers[shard * number_stride + kTies];
    for (int i = lane; i < k; i += 32) {
      const float z = at(shard, i);
      if (z > threshold && shard * k + i != target_at) above += exp2_fast((z - max) * kLog2E);
      if (z == threshold && !counted) tied += 1;
    }
  }
  for (int mask = 16; mask > 0; mask /= 2) {
    above += __shfl_xor_sync(~0u, above, mask);
    tied += __shfl_xor_sync(~0u, tied, mask);
  }
  tied -= target == threshold;
  head = above + (tied > 0 ? tied * exp2_fast((threshold - max) * kLog2E) : 0);
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
  Totals sum;
  for (int64_t shard = 0; shard < shards; shard++) {
    const float* n = numbers + (shard * rows + row) * kNumbers;
    add(sum, {n[kMax], n[kOthers], n[kPadded], n[kWeighted], n[kTarget]});
  }
  double head = 0;
  float threshold = INFINITY;
  if (k > 0)
    head_of<T>(keys + row * k, rows * k, numbers + row * kNumbers, rows * kNumbers, shards, k, (float)sum.max,
               (float)sum.target, head, threshold);
  if (lane == 0)
    shape_row(sum, head, threshold, shaping, loss + row, coefficients + row * kCoefficients, stats + row, rows);
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

  const float upstream = grad_loss[row], *c = coefficients + row * kCoefficients;
  const float max = c[kShift], threshold = c[kThreshold], at_target = upstream * c[kTargetGradient];
  const float in_head = upstream * c[kHeadFactor], in_tail = upstream * c[kTailFactor];
  const float in_padding = upstream * c[kPaddedFactor];
  bool ignored = true;  // then its logits may be anything, NaN included
  for (int i = 0; i < kCoefficients; i++) ignored = ignored && c[i] == 0;
  const int64_t column = targets.ids[row] - vocab_start;
  const int target = column >= 0 && column < columns ? (int)column : -1;

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
#pragma unroll
    for (int j = 0; j < kCount; j++) {
      const float factor = first + j >= ranked ? in_padding : z[j] >= threshold ? in_head : in_tail;
      z[j] = first + j == target ? at_target : factor * exp2_fast((z[j] - max) * kLog2E);
      if (ignored) z[j] = 0;
    }
    store<T>(g_row, first, columns, aligned, z);
  }
}

}  // namespace ptrl
