// ReMiT's token weights on CPUs: how much more a reference prefers each token, against the mean over its segment.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "checks.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows of (b, s) tokens. No segment reaches into a second row, so rows can go to any thread.
struct Tokens {
  Tokens(const Tensor& logprob, const Tensor& reference_logprob, const Tensor& keep,
         const std::optional<Tensor>& segment, int64_t count)
      : rows(logprob.dim() == 2 ? logprob.size(0) : 0), columns(logprob.dim() == 2 ? logprob.size(1) : 0) {
    PTRL_CHECK_SHAPE(logprob, rows, columns);
    PTRL_CHECK_SHAPE(reference_logprob, rows, columns);
    PTRL_CHECK_SHAPE(keep, rows, columns);
    PTRL_CHECK_TYPE(logprob, Float);
    PTRL_CHECK_TYPE(reference_logprob, Float);
    PTRL_CHECK_TYPE(keep, Bool);
    PTRL_CHECK_CONTIGUOUS(logprob);
    PTRL_CHECK_CONTIGUOUS(reference_logprob);
    PTRL_CHECK_CONTIGUOUS(keep);
    current = logprob.const_data_ptr<float>();
    reference = reference_logprob.const_data_ptr<float>();
    kept = keep.const_data_ptr<bool>();
    STD_TORCH_CHECK(segment || rows <= count, "segments are ", count, ", expected one for each of ", rows, " rows");
    if (!segment) return;
    PTRL_CHECK_SHAPE(*segment, rows, columns);
    PTRL_CHECK_TYPE(*segment, Long);
    PTRL_CHECK_CONTIGUOUS(*segment);
    segments = segment->const_data_ptr<int64_t>();
    for (int64_t i = 0; i < rows * columns; i++)
      STD_TORCH_CHECK(0 <= segments[i] && segments[i] < count, "segment is ", segments[i], ", expected 0 to ",
                      count - 1);
  }

  double gap(int64_t i) const { return (double)reference[i] - current[i]; }
  int64_t segment_of(int64_t row, int64_t i) const { return segments ? segments[i] : row; }

  int64_t rows, columns;
  const float *current, *reference;
  const bool* kept;
  const int64_t* segments = nullptr;
};

Tensor gap_sums(const Tensor& logprob, const Tensor& reference_logprob, const Tensor& keep,
                std::optional<Tensor> segment, int64_t count) {
  const Tokens tokens(logprob, reference_logprob, keep, segment, count);
  Tensor sums = torch::stable::new_zeros(logprob, {2, count}, ScalarType::Double);
  double* gaps = sums.mutable_data_ptr<double>();
  double* counts = gaps + count;
  torch::stable::parallel_for(0, tokens.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++)
      for (int64_t i = row * tokens.columns; i < (row + 1) * tokens.columns; i++) {
        if (!tokens.kept[i]) continue;
        const int64_t at = tokens.segment_of(row, i);
        gaps[at] += tokens.gap(i);
        counts[at] += 1;
      }
  });
  return sums;
}

Tensor weights(const Tensor& logprob, const Tensor& reference_logprob, const Tensor& keep,
               std::optional<Tensor> segment, const Tensor& sums, double epsilon) {
  STD_TORCH_CHECK(sums.dim() == 2, "sums have shape ", ptrl::shape_text(sums.sizes()), ", expected (2, segments)");
  const int64_t count = sums.size(1);
  const Tokens tokens(logprob, reference_logprob, keep, segment, count);
  PTRL_CHECK_SHAPE(sums, 2, count);
  PTRL_CHECK_TYPE(sums, Double);
  PTRL_CHECK_CONTIGUOUS(sums);
  const double* gaps = sums.const_data_ptr<double>();
  const double* counts = gaps + count;
  Tensor out = torch::stable::new_empty(logprob, {tokens.rows, tokens.columns});
  float* w = out.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, tokens.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++)
      for (int64_t i = row * tokens.columns; i < (row + 1) * tokens.columns; i++) {
        if (!tokens.kept[i]) {
          w[i] = 0;
          continue;
        }
        const int64_t at = tokens.segment_of(row, i);
        const double centred = tokens.gap(i) - gaps[at] / counts[at];
        const double weight = 2 / (1 + std::exp(-centred));
        w[i] = (float)std::clamp(weight, 1 - epsilon, 1 + epsilon);  // NaN stays
      }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_ptrl, CPU, m) {
  m.impl("remit_gap_sums", TORCH_BOX(&gap_sums));
  m.impl("remit_weights", TORCH_BOX(&weights));
}
