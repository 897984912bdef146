// What every operator on a GPU does around its launches. Nothing here waits for the device.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/tensor.h>

// Weak, so that the library loads in a torch without CUDA, too, where nothing calls this.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream) __attribute__((weak));

namespace ptrl {

inline void check_device(const torch::stable::Tensor& x, const char* name, const torch::stable::Tensor& like) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == like.get_device_index(), name,
                  " is on another device, expected CUDA device ", (int)like.get_device_index());
}

inline cudaStream_t current_stream(const torch::stable::Tensor& like) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "a launch failed: ", cudaGetErrorString(error));
}

}  // namespace ptrl
