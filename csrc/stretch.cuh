// What a block does with a stretch of a row, and a warp with what all stretches say of it: the work that the kernels of
// one and of two passes share.
#pragma once

#include "rows.h"
#include "top_k.cuh"
#include "totals.cuh"

namespace ptrl {

// Some columns of a row. `target` counts from the first of them, -1 where it is elsewhere.
struct Stretch {
  int columns, ranked, target;

  __device__ Stretch(int columns, int ranked, int64_t target)
      : columns(columns),
        ranked(min(max(ranked, 0), columns)),
        target(target >= 0 && target < columns ? (int)target : -1) {}
};

template <class T, bool kRank, int kThreads>
struct ScanShared {
  Reduction<kThreads> reduction;
  Candidates<T, kRank ? kThreads : 32> candidates;
};

// The columns of ptrl::Number and the top_k largest logits, by all threads of a block; `fetch` gives a thread its
// logits of a tile, tile by tile. Other threads may read the results behind a barrier.
template <class T, bool kEntropy, bool kRank, int kThreads, class Fetch>
__device__ inline void scan(ScanShared<T, kRank, kThreads>& shared, const typename T::Raw* z_row,
                            const Stretch& stretch, int top_k, float* numbers, typename T::Raw* list, Fetch fetch) {
  constexpr int kCount = kPerLoad<T>, kTile = kThreads * kCount;
  Sums sums;
  TopK<T, kRank ? kThreads : 32> top(shared.candidates, top_k);
  if (kRank) top.begin();
  for (int tile = 0; tile * (int64_t)kTile < stretch.columns; tile++) {
    const int first = tile * kTile + threadIdx.x * kCount;
    float z[kCount];
    unpack<T>(fetch(tile), z);
    if (first + kCount <= stretch.ranked && (unsigned)(stretch.target - first) >= (unsigned)kCount)
      add_inner<kEntropy>(sums, z);
    else
      add_edge<kEntropy>(sums, z, first, stretch.ranked, stretch.columns, stretch.target);
    if (kRank) top.consider(tile, z);
  }

  const Totals totals = block_totals<kEntropy>(sums, shared.reduction);
  const int ties = kRank ? top.finish(list) : 0;
  if (threadIdx.x > 0) return;
  numbers[kMax] = (float)totals.max;
  numbers[kOthers] = (float)totals.others;
  numbers[kPadded] = (float)totals.padded;
  numbers[kWeighted] = (float)totals.weighted;
  // A target that pads the vocabulary makes loss and gradient NaN.
  numbers[kTarget] = stretch.target < 0                ? 0
                     : stretch.target < stretch.ranked ? T::to_float(z_row[stretch.target])
                                                       : NAN;
  numbers[kTies] = (float)ties;
  numbers[kWidth] = (float)stretch.columns;
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

// Loss, ptrl::Coefficient and ptrl::Stat of a row from what its `shards` stretches say of it; a warp's work, written by
// its first lane. The numbers of a shard are `number_stride` apart, the lists of k keys `key_stride`.
template <class T>
__device__ inline void join(const float* numbers, int64_t number_stride, const typename T::Raw* keys,
                            int64_t key_stride, int shards, int k, int64_t target, const Shaping& shaping, float* loss,
                            float* coefficients, float* stats, int64_t stat_stride) {
  Totals sum;
  double columns = 0;
  for (int64_t shard = 0; shard < shards; shard++) {
    const float* n = numbers + shard * number_stride;
    add(sum, {n[kMax], n[kOthers], n[kPadded], n[kWeighted], n[kTarget]});
    columns += n[kWidth];
  }
  check_target(sum, target, columns);
  double head = 0;
  float threshold = INFINITY;
  if (k > 0)
    head_of<T>(keys, key_stride, numbers, number_stride, shards, k, (float)sum.max, (float)sum.target, head, threshold);
  if (threadIdx.x % 32 == 0) shape_row(sum, head, threshold, shaping, loss, coefficients, stats, stat_stride);
}

// The gradient of a row's logits, from its coefficients.
struct Gradient {
  float max, threshold, at_target, in_head, in_tail, in_padding;
  bool ignored = true;  // then the logits may be anything, NaN included

  __device__ Gradient(const float* c, float upstream)
      : max(c[kShift]),
        threshold(c[kThreshold]),
        at_target(upstream * c[kTargetGradient]),
        in_head(upstream * c[kHeadFactor]),
        in_tail(upstream * c[kTailFactor]),
        in_padding(upstream * c[kPaddedFactor]) {
    for (int i = 0; i < kCoefficients; i++) ignored = ignored && c[i] == 0;
  }

  // Of the logits `z`, in their place; the first is column `first` of the stretch.
  template <int kCount>
  __device__ void write_over(float (&z)[kCount], int first, const Stretch& stretch) const {
#pragma unroll
    for (int j = 0; j < kCount; j++) {
      const float e = exp2_fast((z[j] - max) * kLog2E);  // before the choices, or there is a branch around each
      const float factor = first + j >= stretch.ranked ? in_padding : z[j] >= threshold ? in_head : in_tail;
      z[j] = first + j == stretch.target ? at_target : factor * e;
      if (ignored) z[j] = 0;
    }
  }
};

}  // namespace ptrl
