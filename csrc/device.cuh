// What the kernels ask of the device beyond plain C++. tests/cuda_emulation/ answers the same questions on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define PTRL_SHARED(Type, name) __shared__ Type name

namespace ptrl {

using Stream = cudaStream_t;

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, Stream stream, const Arguments&... arguments) {
  kernel<<<dim3((unsigned)blocks), threads, 0, stream>>>(arguments...);
}

__device__ inline float exp2_fast(float x) {  // 2 ulp; denormal results are 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats, rounded to nearest even, as the halves of a word; the first one low.
__device__ inline uint32_t pack_bfloat16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ inline uint32_t pack_half(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ inline float half_to_float(uint16_t raw) { return __half2float(__ushort_as_half(raw)); }

}  // namespace ptrl
