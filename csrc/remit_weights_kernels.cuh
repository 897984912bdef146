// ReMiT's token weights on a GPU. Tokens are taken four at a time in the order of memory, across the ends of rows, so
// that loads are of 16 bytes whatever the length of a row.
// Compiles for CUDA and, with the functions of device.cuh from elsewhere, for the emulation in tests/.
#pragma once

#ifdef __CUDACC__
#include "device.cuh"
#endif

#include "remit_weights.h"

namespace ptrl {

constexpr int kGroup = 4;

// Gaps are added as integers, in units of 2^-28 nats: integers give the same sum in any order, so that atomic additions
// repeat to the bit. A gap is rounded by at most 2^-29 = 1.9e-9, and so is their mean. It is cut into 31 low bits and
// the rest, which with |gap| < 2^34 is at most 2^31: over fewer than 2^31 tokens neither sum leaves 63 bits. A greater
// gap, an infinite one and NaN are counted instead, and make the sum NaN.
constexpr double kUnitsPerNat = 1 << 28, kLargestGap = 1ll << 34;
constexpr int kLowBits = 31, kSpoiltBit = 32;

struct GapSum {
  unsigned long long high = 0, low = 0;  // high is signed, modulo 2^64
  unsigned long long tokens = 0;         // and 2^32 times those that spoil the sum

  __device__ void add(double gap) {
    tokens += 1;
    if (fabs(gap) < kLargestGap) {
      const long long units = llrint(gap * kUnitsPerNat);
      high += (unsigned long long)(units >> kLowBits);
      low += (unsigned long long)units & ((1ull << kLowBits) - 1);
    } else {
      tokens += 1ull << kSpoiltBit;
    }
  }
};

struct Group {
  float logprob[kGroup], reference_logprob[kGroup];
  bool keep[kGroup];
  int64_t segment[kGroup];
};

template <class T>
struct alignas(sizeof(T) * kGroup < 16 ? sizeof(T) * kGroup : 16) Four {
  T values[kGroup];
};

template <class T>
__device__ inline bool is_one_access(const T* from, int64_t left) {
  return left >= kGroup && reinterpret_cast<uintptr_t>(from) % alignof(Four<T>) == 0;
}

// `left` tokens remain from here on; what lies beyond them is `nothing`.
template <class T>
__device__ inline void load_four(const T* from, int64_t left, T nothing, T (&to)[kGroup]) {
  if (is_one_access(from, left)) {
    const Four<T> four = *reinterpret_cast<const Four<T>*>(from);
#pragma unroll
    for (int j = 0; j < kGroup; j++) to[j] = four.values[j];
    return;
  }
#pragma unroll
  for (int j = 0; j < kGroup; j++) to[j] = j < left ? from[j] : nothing;
}

__device__ inline Group load_group(const RemitTokens& tokens, int64_t first) {
  Group group;
  const int64_t left = tokens.count() - first;
  load_four(tokens.logprob + first, left, 0.f, group.logprob);
  load_four(tokens.reference_logprob + first, left, 0.f, group.reference_logprob);
  load_four(tokens.keep + first, left, false, group.keep);
  if (tokens.segment) {
    load_four(tokens.segment + first, left, (int64_t)-1, group.segment);
    return group;
  }
  int64_t row = first / tokens.columns, column = first % tokens.columns;
#pragma unroll
  for (int j = 0; j < kGroup; j++) {
    group.segment[j] = row;
    if (++column == tokens.columns) {
      column = 0;
      row++;
    }
  }
  return group;
}

__device__ inline bool is_segment(const RemitTokens& tokens, int64_t at) {
  return (uint64_t)at < (uint64_t)tokens.segments;
}

// A segment that is out of range gets nothing written; its tokens get NaN from the other kernel.
__device__ inline void flush(const RemitTokens& tokens, GapSum* sums, int64_t at, const GapSum& sum) {
  if (sum.tokens == 0 || !is_segment(tokens, at)) return;
  atomicAdd(&sums[at].high, sum.high);
  atomicAdd(&sums[at].low, sum.low);
  atomicAdd(&sums[at].tokens, sum.tokens);
}

// A thread adds up each run of tokens of one segment, a warp that sees a single segment adds up its threads.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) gap_sums_kernel(RemitTokens tokens, GapSum* sums) {
  const int64_t first = (blockIdx.x * (int64_t)kThreads + threadIdx.x) * kGroup;
  GapSum sum;
  int64_t at = -1;
  if (first < tokens.count()) {
    const Group group = load_group(tokens, first);
    at = group.segment[0];
#pragma unroll
    for (int j = 0; j < kGroup; j++) {
      if (!group.keep[j]) continue;
      if (group.segment[j] != at) {
        flush(tokens, sums, at, sum);
        sum = GapSum();
        at = group.segment[j];
      }
      sum.add(remit_gap(group.logprob[j], group.reference_logprob[j]));
    }
  }
  const bool together = __ballot_sync(~0u, at == __shfl_sync(~0u, at, 0)) == ~0u;
  if (together) {
    for (int mask = 16; mask > 0; mask /= 2) {
      sum.high += __shfl_xor_sync(~0u, sum.high, mask);
      sum.low += __shfl_xor_sync(~0u, sum.low, mask);
      sum.tokens += __shfl_xor_sync(~0u, sum.tokens, mask);
    }
  }
  if (!together || threadIdx.x % 32 == 0) flush(tokens, sums, at, sum);
}

// The integers as the operator's fp64, (2, segments).
template <int kThreads>
__global__ void __launch_bounds__(kThreads) finish_sums_kernel(const GapSum* sums, int64_t segments, double* out) {
  const int64_t i = blockIdx.x * (int64_t)kThreads + threadIdx.x;
  if (i >= segments) return;
  const GapSum sum = sums[i];
  const double units = (double)(long long)sum.high * (1ull << kLowBits) + (double)sum.low;
  out[i] = sum.tokens >> kSpoiltBit ? NAN : units / kUnitsPerNat;
  out[segments + i] = (double)(sum.tokens & ((1ull << kSpoiltBit) - 1));
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    weights_kernel(RemitTokens tokens, const double* sums, double epsilon, float* weights) {
  const int64_t first = (blockIdx.x * (int64_t)kThreads + threadIdx.x) * kGroup, left = tokens.count() - first;
  if (left <= 0) return;
  const Group group = load_group(tokens, first);
  Four<float> weight;
#pragma unroll
  for (int j = 0; j < kGroup; j++) {
    const int64_t at = group.segment[j];
    weight.values[j] = 0;
    if (!group.keep[j]) continue;
    const double gap = remit_gap(group.logprob[j], group.reference_logprob[j]);
    weight.values[j] = is_segment(tokens, at) ? remit_weight(gap, sums[at], sums[tokens.segments + at], epsilon) : NAN;
  }
  float* to = weights + first;
  if (is_one_access(to, left)) {
    *reinterpret_cast<Four<float>*>(to) = weight;
    return;
  }
#pragma unroll
  for (int j = 0; j < kGroup; j++)
    if (j < left) to[j] = weight.values[j];
}

// `scratch` has one for each segment, all zero.
template <int kThreads>
void launch_gap_sums(const RemitTokens& tokens, GapSum* scratch, double* sums, Stream stream) {
  constexpr int64_t kPerBlock = (int64_t)kThreads * kGroup;
  const int64_t blocks = (tokens.count() + kPerBlock - 1) / kPerBlock;
  if (blocks > 0) launch(&gap_sums_kernel<kThreads>, blocks, kThreads, stream, tokens, scratch);
  const int64_t others = (tokens.segments + kThreads - 1) / kThreads;
  if (others > 0)
    launch(&finish_sums_kernel<kThreads>, others, kThreads, stream, (const GapSum*)scratch, tokens.segments, sums);
}

template <int kThreads>
void launch_weights(const RemitTokens& tokens, const double* sums, double epsilon, float* weights, Stream stream) {
  constexpr int64_t kPerBlock = (int64_t)kThreads * kGroup;
  const int64_t blocks = (tokens.count() + kPerBlock - 1) / kPerBlock;
  if (blocks > 0) launch(&weights_kernel<kThreads>, blocks, kThreads, stream, tokens, sums, epsilon, weights);
}

}  // namespace ptrl
