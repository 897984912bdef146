// Checks of operator arguments that name the tensor and say what came and what was expected.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <string>

namespace ptrl {

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text = "[";
  for (const int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

}  // namespace ptrl

#define PTRL_CHECK_SHAPE(x, ...)                                                                                    \
  do {                                                                                                              \
    const std::vector<int64_t> expected{__VA_ARGS__};                                                               \
    STD_TORCH_CHECK(ptrl::shape_text((x).sizes()) == ptrl::shape_text(expected), #x " has shape ",                  \
                    ptrl::shape_text((x).sizes()), ", expected (" #__VA_ARGS__ ") = ", ptrl::shape_text(expected)); \
  } while (0)

#define PTRL_CHECK_CONTIGUOUS(x) \
  STD_TORCH_CHECK((x).is_contiguous(), #x " has strides ", ptrl::shape_text((x).strides()), ", expected contiguous")

#define PTRL_CHECK_TYPE(x, type)                                                                   \
  STD_TORCH_CHECK((x).scalar_type() == torch::headeronly::ScalarType::type, #x " has scalar type " \
                  "number ", (int)(x).scalar_type(), ", expected " #type)
