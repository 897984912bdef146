// How logits come from memory and go back: 16 bytes a thread where the row allows it, one by one elsewhere. The columns
// of a thread are the same either way, so that alignment does not change a result.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#include "device.cuh"
#endif

namespace ptrl {

constexpr float kLog2E = 1.44269504f;
constexpr float kVanishing = -88.f;  // e^x below counts as 0

struct alignas(16) Loaded {
  uint32_t words[4];
};

struct BFloat16 {
  using Raw = uint16_t;
  using Key = uint16_t;
  static __device__ float to_float(Raw raw) { return __uint_as_float((uint32_t)raw << 16); }
  static __device__ uint32_t pack(float low, float high) { return pack_bfloat16(low, high); }
};

struct Half {
  using Raw = uint16_t;
  using Key = uint16_t;
  static __device__ float to_float(Raw raw) { return half_to_float(raw); }
  static __device__ uint32_t pack(float low, float high) { return pack_half(low, high); }
};

struct Float {
  using Raw = uint32_t;
  using Key = uint32_t;
  static __device__ float to_float(Raw raw) { return __uint_as_float(raw); }
};

template <class T>
constexpr int kPerLoad = 16 / sizeof(typename T::Raw);
template <class T>
constexpr bool kPaired = sizeof(typename T::Raw) == 2;

template <class T>
__device__ inline typename T::Raw from_float(float x) {
  if constexpr (kPaired<T>)
    return (typename T::Raw)T::pack(x, 0);
  else
    return __float_as_uint(x);
}

__device__ inline bool is_aligned(const void* row) { return reinterpret_cast<uintptr_t>(row) % 16 == 0; }

// Beyond the end of the row there is -inf.
template <class T>
__device__ inline Loaded load(const typename T::Raw* row, int first, int columns, bool aligned) {
  constexpr int kCount = kPerLoad<T>, kInWord = kPaired<T> ? 2 : 1;
  if (aligned && first + kCount <= columns) return *reinterpret_cast<const Loaded*>(row + first);
  const uint32_t nothing = from_float<T>(-INFINITY);
  Loaded loaded{};
#pragma unroll
  for (int j = 0; j < kCount; j++) {
    const uint32_t raw = first + j < columns ? row[first + j] : nothing;
    loaded.words[j / kInWord] |= raw << (j % kInWord * 16);
  }
  return loaded;
}

template <class T>
__device__ inline void unpack(const Loaded& loaded, float (&z)[kPerLoad<T>]) {
#pragma unroll
  for (int j = 0; j < kPerLoad<T>; j++) {
    if constexpr (kPaired<T>)
      z[j] = T::to_float((typename T::Raw)(loaded.words[j / 2] >> (j % 2 * 16)));
    else
      z[j] = T::to_float(loaded.words[j]);
  }
}

template <class T>
__device__ inline void store(typename T::Raw* row, int first, int columns, bool aligned,
                             const float (&z)[kPerLoad<T>]) {
  constexpr int kCount = kPerLoad<T>;
  Loaded packed;
#pragma unroll
  for (int w = 0; w < 4; w++) {
    if constexpr (kPaired<T>)
      packed.words[w] = T::pack(z[2 * w], z[2 * w + 1]);
    else
      packed.words[w] = __float_as_uint(z[w]);
  }
  if (aligned && first + kCount <= columns) {
    *reinterpret_cast<Loaded*>(row + first) = packed;
    return;
  }
#pragma unroll
  for (int j = 0; j < kCount; j++)
    if (first + j < columns)
      row[first + j] = (typename T::Raw)(packed.words[kPaired<T> ? j / 2 : j] >> (kPaired<T> ? j % 2 * 16 : 0));
}

template <int kCount>
__device__ inline float largest(const float (&z)[kCount]) {  // of those that are not NaN
  float top = z[0];
#pragma unroll
  for (int j = 1; j < kCount; j++) top = fmaxf(top, z[j]);
  return top;
}

}  // namespace ptrl
