// ReMiT's token weights on GPUs: the operators around the launches. Nothing here waits for the device.
// Sums and weights are two operators because under context parallelism the sums are reduced over the ranks in between.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "checks.h"
#include "cuda_call.h"
#include "remit_weights_kernels.cuh"

namespace {

using namespace ptrl;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;

RemitTokens tokens_of(const Tensor& logprob, const Tensor& reference_logprob, const Tensor& keep,
                      const std::optional<Tensor>& segment, int64_t segments) {
  const RemitTokens tokens = check_remit(logprob, reference_logprob, keep, segment, segments);
  STD_TORCH_CHECK(tokens.columns < 1ll << 31, "logprob has ", tokens.columns, " columns, expected < 2^31");
  check_device(reference_logprob, "reference_logprob", logprob);
  check_device(keep, "keep", logprob);
  if (segment) check_device(*segment, "segment", logprob);
  return tokens;
}

Tensor gap_sums(const Tensor& logprob, const Tensor& reference_logprob, const Tensor& keep,
                std::optional<Tensor> segment, int64_t segments) {
  const RemitTokens tokens = tokens_of(logprob, reference_logprob, keep, segment, segments);
  const torch::stable::accelerator::DeviceGuard guard(logprob.get_device_index());
  constexpr int64_t kWords = sizeof(GapSum) / sizeof(int64_t);
  Tensor scratch = torch::stable::new_zeros(logprob, {segments, kWords}, ScalarType::Long);
  Tensor sums = torch::stable::new_empty(logprob, {2, segments}, ScalarType::Double);
  launch_gap_sums<kThreads>(tokens, reinterpret_cast<GapSum*>(scratch.mutable_data_ptr<int64_t>()),
                            sums.mutable_data_ptr<double>(), current_stream(logprob));
  check_launch();
  return sums;
}

Tensor weights(const Tensor& logprob, const Tensor& reference_logprob, const Tensor& keep,
               std::optional<Tensor> segment, const Tensor& sums, double epsilon) {
  const RemitTokens tokens = tokens_of(logprob, reference_logprob, keep, segment, check_remit_sums(sums));
  check_device(sums, "sums", logprob);
  const torch::stable::accelerator::DeviceGuard guard(logprob.get_device_index());
  Tensor out = torch::stable::new_empty(logprob, {tokens.rows, tokens.columns});
  launch_weights<kThreads>(tokens, sums.const_data_ptr<double>(), epsilon, out.mutable_data_ptr<float>(),
                           current_stream(logprob));
  check_launch();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_ptrl, CUDA, m) {
  m.impl("remit_gap_sums", TORCH_BOX(&gap_sums));
  m.impl("remit_weights", TORCH_BOX(&weights));
}
