// What the kernels ask of the device beyond plain C++. tests/cuda_emulation/ answers the same questions on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define PTRL_SHARED(Type, name) __shared__ Type name
#define PTRL_DYNAMIC_SHARED(Type, name)                         \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  Type* name = reinterpret_cast<Type*>(name##_bytes)

namespace ptrl {

using Stream = cudaStream_t;

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, Stream stream, const Arguments&... arguments) {
  kernel<<<dim3((unsigned)blocks), threads, 0, stream>>>(arguments...);
}

// How large `dynamic_size` may be on the current device; 0 where the kernel as it was compiled for it knows no
// clusters.
template <class Kernel>
int64_t room_in_cluster(Kernel* kernel, int64_t declared) {
  cudaFuncAttributes compiled{};
  int device = 0, most = 0;
  cudaFuncGetAttributes(&compiled, kernel);
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return compiled.ptxVersion >= 90 ? most - declared : 0;
}

// Clusters of `blocks` thread blocks, each with `dynamic_size` bytes of shared memory besides what the kernel declares.
template <class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), int64_t clusters, int blocks, int threads, int64_t dynamic_size,
                     Stream stream, const Arguments&... arguments) {
  cudaFuncAttributes compiled{};
  cudaFuncGetAttributes(&compiled, kernel);
  // All that there is, whatever this launch takes: another thread may be about to launch the kernel with more.
  const int64_t most = room_in_cluster(kernel, (int64_t)compiled.sharedSizeBytes);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)most);
  cudaLaunchAttribute shape{};
  shape.id = cudaLaunchAttributeClusterDimension;
  shape.val.clusterDim.x = blocks;
  shape.val.clusterDim.y = shape.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3((unsigned)(clusters * blocks));
  config.blockDim = threads;
  config.dynamicSmemBytes = dynamic_size;
  config.stream = stream;
  config.attrs = &shape;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, arguments...);
}

// A cluster barrier in two halves, release and acquire: every thread of the cluster comes to both.
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// Where a block of the cluster has in its shared memory what this one has at `mine`.
template <class T>
__device__ inline T* peer(T* mine, int block) {
#if __CUDA_ARCH__ >= 900
  uint64_t theirs;
  asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(block));
  return reinterpret_cast<T*>(theirs);
#else
  return mine;
#endif
}

// To shared memory, past the registers. What one thread has asked for up to close_copies() is a group; behind
// wait_for_copies<n>() all of its groups but the last n are there for it to read.
__device__ inline void copy_16_bytes(void* to, const void* from) {
  const unsigned shared = (unsigned)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
}
__device__ inline void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kOpen>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
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
