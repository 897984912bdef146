// The sums of a stretch of a row: over the logits of a thread in fp32, over those of its block in fp64.
#pragma once

#include "logits.cuh"
#include "reward_shaped_ce.h"

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

// A load has sums of its own first: one by one, hundreds of equal terms would all be rounded to the same side.
template <bool kEntropy, int kCount>
__device__ inline void add_inner(Sums& sums, const float (&z)[kCount]) {
  const float top = largest(z);
  if (top > sums.max) rescale<kEntropy>(sums, top);
  const float max = sums.max > -INFINITY ? sums.max : 0;
  float others = 0, weighted = 0;
#pragma unroll
  for (int j = 0; j < kCount; j++) others += exponential<kEntropy>(z[j], max, weighted);
  sums.others += others;
  if (kEntropy) sums.weighted += weighted;
}

// The same where the target, padding or the end of the row is among these columns. What is not ranked becomes NaN, so
// that no comparison lets it through.
template <bool kEntropy, int kCount>
__device__ inline void add_edge(Sums& sums, float (&z)[kCount], int first, int ranked, int columns, int target) {
  const float top = largest(z);  // beyond the end there is -inf
  if (top > sums.max) rescale<kEntropy>(sums, top);
  const float max = sums.max > -INFINITY ? sums.max : 0;
  float others = 0, padded = 0, weighted = 0;
#pragma unroll
  for (int j = 0; j < kCount; j++) {
    const int column = first + j;
    if (column < columns && column != target) {
      const float e = exponential<kEntropy>(z[j], max, weighted);
      (column < ranked ? others : padded) += e;
    }
    if (column >= ranked) z[j] = NAN;
  }
  sums.others += others;
  sums.padded += padded;
  if (kEntropy) sums.weighted += weighted;
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

}  // namespace ptrl
