// ReMiT's token weights on CPUs: how much more a reference prefers each token, against the mean over its segment.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "checks.h"

namespace {

using namespace ptrl;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// No segment reaches into a second row, so rows can go to any thread. `visit` is called for each token that is kept,
// with its place and its segment, `skip` for the others.
template <class Visit, class Skip>
void for_each_token(const RemitTokens& tokens, const Visit& visit, const Skip& skip) {
  if (tokens.segment)
    for (int64_t i = 0; i < tokens.count(); i++)
      STD_TORCH_CHECK(0 <= tokens.segment[i] && tokens.segment[i] < tokens.segments, "segment is ", tokens.segment[i],
                      ", expected 0 to ", tokens.segments - 1);
  torch::stable::parallel_for(0, tokens.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++)
      for (int64_t i = row * tokens.columns; i < (row + 1) * tokens.columns; i++) {
        if (tokens.keep[i])
          visit(i, tokens.segment ? tokens.segment[i] : row);
        else
          skip(i);
      }
  });
}

Tensor gap_sums(const Tensor& logprob, const Tensor& reference_logprob, const Tensor& keep,
                std::optional<Tensor> segment, int64_t segments) {
  const RemitTokens tokens = check_remit(logprob, reference_logprob, keep, segment, segments);
  Tensor sums = torch::stable::new_zeros(logprob, {2, segments}, ScalarType::Double);
  double* gaps = sums.mutable_data_ptr<double>();
  double* counts = gaps + segments;
  const auto add = [&](int64_t i, int64_t at) {
    gaps[at] += remit_gap(tokens.logprob[i], tokens.reference_logprob[i]);
    counts[at] += 1;
  };
  for_each_token(tokens, add, [](int64_t) {});
  return sums;
}

Tensor weights(const Tensor& logprob, const Tensor& reference_logprob, const Tensor& keep,
               std::optional<Tensor> segment, const Tensor& sums, double epsilon) {
  const RemitTokens tokens = check_remit(logprob, reference_logprob, keep, segment, check_remit_sums(sums));
  const double* gaps = sums.const_data_ptr<double>();
  const double* counts = gaps + tokens.segments;
  Tensor out = torch::stable::new_empty(logprob, {tokens.rows, tokens.columns});
  float* w = out.mutable_data_ptr<float>();
  const auto weigh = [&](int64_t i, int64_t at) {
    w[i] = remit_weight(remit_gap(tokens.logprob[i], tokens.reference_logprob[i]), gaps[at], counts[at], epsilon);
  };
  for_each_token(tokens, weigh, [&](int64_t i) { w[i] = 0; });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_ptrl, CPU, m) {
  m.impl("remit_gap_sums", TORCH_BOX(&gap_sums));
  m.impl("remit_weights", TORCH_BOX(&weights));
}
