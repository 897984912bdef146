// Checks of operator arguments, the same on every device: they name the tensor, what came and what was expected.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

#include "remit_weights.h"
#include "reward_shaped_ce.h"
#include "rows.h"

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

#define PTRL_CHECK_TYPE(x, type)                                                                           \
  STD_TORCH_CHECK((x).scalar_type() == torch::headeronly::ScalarType::type, #x " has scalar type number ", \
                  (int)(x).scalar_type(), ", expected " #type)

namespace ptrl {

inline Rows rows_of(const torch::stable::Tensor& x, const char* name) {
  const std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end()), strides(x.strides().begin(), x.strides().end());
  STD_TORCH_CHECK(!sizes.empty() && (sizes.back() <= 1 || strides.back() == 1), name, " has strides ",
                  shape_text(strides), ", expected the last dimension to be dense");
  Rows rows;
  STD_TORCH_CHECK(find_rows(x.data_ptr(), x.element_size(), sizes.data(), strides.data(), (int64_t)sizes.size(), rows),
                  name, " has strides ", shape_text(strides), ", expected at most ", (int)Rows::kDims,
                  " leading dimensions that do not follow on each other");
  return rows;
}

inline void check_stats(const Rows& logits, const torch::stable::Tensor& target, int64_t ranked, int64_t top_k) {
  const int64_t rows = logits.count, columns = logits.columns;
  PTRL_CHECK_TYPE(target, Long);
  PTRL_CHECK_CONTIGUOUS(target);
  PTRL_CHECK_SHAPE(target, rows);
  STD_TORCH_CHECK(0 <= ranked && ranked <= columns, "ranked is ", ranked, ", expected 0 to ", columns);
  STD_TORCH_CHECK(0 <= top_k && top_k < 1 << 24, "top_k is ", top_k, ", expected >= 0 and < 2^24");
  STD_TORCH_CHECK(columns < 1 << 24, "logits have ", columns, " columns, expected < 2^24");
}

inline void check_one_pass(const Rows& logits, const torch::stable::Tensor& target,
                           const torch::stable::Tensor& grad_loss, int64_t ranked, int64_t top_k) {
  const int64_t rows = logits.count;
  check_stats(logits, target, ranked, top_k);
  PTRL_CHECK_TYPE(grad_loss, Float);
  PTRL_CHECK_SHAPE(grad_loss, rows);
  PTRL_CHECK_CONTIGUOUS(grad_loss);
}

inline void check_combine(const torch::stable::Tensor& numbers, const torch::stable::Tensor& keys,
                          const torch::stable::Tensor& target) {
  STD_TORCH_CHECK(keys.dim() == 3, "keys have shape ", shape_text(keys.sizes()), ", expected (shards, rows, top_k)");
  const int64_t shards = keys.size(0), rows = keys.size(1);
  PTRL_CHECK_TYPE(numbers, Float);
  PTRL_CHECK_TYPE(target, Long);
  PTRL_CHECK_SHAPE(numbers, shards, rows, kNumbers);
  PTRL_CHECK_SHAPE(target, rows);
  PTRL_CHECK_CONTIGUOUS(numbers);
  PTRL_CHECK_CONTIGUOUS(keys);
  PTRL_CHECK_CONTIGUOUS(target);
}

inline void check_grad(const Rows& logits, const torch::stable::Tensor& target, const torch::stable::Tensor& grad_loss,
                       const torch::stable::Tensor& coefficients, int64_t ranked) {
  const int64_t rows = logits.count, columns = logits.columns;
  PTRL_CHECK_TYPE(target, Long);
  PTRL_CHECK_TYPE(grad_loss, Float);
  PTRL_CHECK_TYPE(coefficients, Float);
  PTRL_CHECK_SHAPE(target, rows);
  PTRL_CHECK_SHAPE(grad_loss, rows);
  PTRL_CHECK_SHAPE(coefficients, rows, kCoefficients);
  PTRL_CHECK_CONTIGUOUS(target);
  PTRL_CHECK_CONTIGUOUS(grad_loss);
  PTRL_CHECK_CONTIGUOUS(coefficients);
  STD_TORCH_CHECK(0 <= ranked && ranked <= columns, "ranked is ", ranked, ", expected 0 to ", columns);
  STD_TORCH_CHECK(columns < 1 << 24, "logits have ", columns, " columns, expected < 2^24");
}

inline RemitTokens check_remit(const torch::stable::Tensor& logprob, const torch::stable::Tensor& reference_logprob,
                               const torch::stable::Tensor& keep, const std::optional<torch::stable::Tensor>& segments,
                               int64_t count) {
  const bool two = logprob.dim() == 2;
  const int64_t rows = two ? logprob.size(0) : 0, columns = two ? logprob.size(1) : 0;
  PTRL_CHECK_SHAPE(logprob, rows, columns);
  PTRL_CHECK_SHAPE(reference_logprob, rows, columns);
  PTRL_CHECK_SHAPE(keep, rows, columns);
  PTRL_CHECK_TYPE(logprob, Float);
  PTRL_CHECK_TYPE(reference_logprob, Float);
  PTRL_CHECK_TYPE(keep, Bool);
  PTRL_CHECK_CONTIGUOUS(logprob);
  PTRL_CHECK_CONTIGUOUS(reference_logprob);
  PTRL_CHECK_CONTIGUOUS(keep);
  RemitTokens tokens{logprob.const_data_ptr<float>(),
                     reference_logprob.const_data_ptr<float>(),
                     keep.const_data_ptr<bool>(),
                     nullptr,
                     rows,
                     columns,
                     count};
  STD_TORCH_CHECK(segments || rows <= count, "segments are ", count, ", expected one for each of ", rows, " rows");
  if (!segments) return tokens;
  const torch::stable::Tensor& segment = *segments;
  PTRL_CHECK_SHAPE(segment, rows, columns);
  PTRL_CHECK_TYPE(segment, Long);
  PTRL_CHECK_CONTIGUOUS(segment);
  tokens.segment = segment.const_data_ptr<int64_t>();
  return tokens;
}

// Returns for how many segments they are.
inline int64_t check_remit_sums(const torch::stable::Tensor& sums) {
  STD_TORCH_CHECK(sums.dim() == 2, "sums have shape ", shape_text(sums.sizes()), ", expected (2, segments)");
  const int64_t segments = sums.size(1);
  PTRL_CHECK_SHAPE(sums, 2, segments);
  PTRL_CHECK_TYPE(sums, Double);
  PTRL_CHECK_CONTIGUOUS(sums);
  return segments;
}

}  // namespace ptrl
