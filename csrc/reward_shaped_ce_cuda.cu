// The reward-shaped cross entropy on GPUs: the operators around the launches. Nothing here waits for the device.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "checks.h"
#include "cuda_call.h"
#include "reward_shaped_ce_launch.cuh"

namespace {

using namespace ptrl;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kHalf;
    case ScalarType::Float:
      return Dtype::kFloat;
    default:
      STD_TORCH_CHECK(false, name, " has scalar type number ", (int)x.scalar_type(),
                      ", expected bfloat16, float16 or float32");
  }
}

Launcher<256, 256> launcher_for(const Tensor& like) { return {current_stream(like)}; }

template <class Call>
void run(Dtype dtype, const Call& call, const Tensor& like) {
  launcher_for(like)(dtype, call);
  check_launch();
}

Targets targets_of(const Tensor& target, const std::optional<int64_t>& ignore_index) {
  return {target.const_data_ptr<int64_t>(), ignore_index.has_value(), ignore_index.value_or(0)};
}

std::tuple<Tensor, Tensor> stats(const Tensor& logits, const Tensor& target, int64_t vocab_start, int64_t ranked,
                                 int64_t top_k, bool entropy, std::optional<int64_t> ignore_index) {
  const Dtype dtype = dtype_of(logits, "logits");
  const Rows z = rows_of(logits, "logits");
  check_stats(z, target, ranked, top_k);
  check_device(target, "target", logits);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  Tensor numbers = torch::stable::new_empty(logits, {z.count, kNumbers}, ScalarType::Float);
  Tensor keys = torch::stable::new_empty(logits, {z.count, top_k});
  if (z.count > 0)
    run(dtype,
        StatsCall{z, targets_of(target, ignore_index), vocab_start, (int)ranked, (int)top_k, entropy,
                  numbers.mutable_data_ptr<float>(), keys.data_ptr()},
        logits);
  return {numbers, keys};
}

std::tuple<Tensor, Tensor, Tensor> combine(const Tensor& numbers, const Tensor& keys, const Tensor& target, double beta,
                                           double lambda_head, double lambda_tail,
                                           std::optional<int64_t> ignore_index) {
  const Dtype dtype = dtype_of(keys, "keys");
  check_combine(numbers, keys, target);
  check_device(keys, "keys", numbers);
  check_device(target, "target", numbers);
  const int64_t shards = keys.size(0), rows = keys.size(1), top_k = keys.size(2);
  const torch::stable::accelerator::DeviceGuard guard(numbers.get_device_index());
  Tensor loss = torch::stable::new_empty(numbers, {rows});
  Tensor coefficients = torch::stable::new_empty(numbers, {rows, kCoefficients});
  Tensor stats = torch::stable::new_empty(numbers, {kStats, rows});
  if (rows > 0)
    run(dtype,
        CombineCall{numbers.const_data_ptr<float>(),
                    keys.data_ptr(),
                    targets_of(target, ignore_index),
                    (int)shards,
                    rows,
                    (int)top_k,
                    {beta, lambda_head, lambda_tail},
                    loss.mutable_data_ptr<float>(),
                    coefficients.mutable_data_ptr<float>(),
                    stats.mutable_data_ptr<float>()},
        numbers);
  return {loss, coefficients, stats};
}

void write_gradient(const Tensor& logits, const Tensor& target, const Tensor& grad_loss, const Tensor& coefficients,
                    int64_t vocab_start, int64_t ranked, const Tensor& grad) {
  const Dtype dtype = dtype_of(logits, "logits");
  const Rows z = rows_of(logits, "logits"), g = rows_of(grad, "grad");
  check_grad(z, target, grad_loss, coefficients, ranked);
  check_device(target, "target", logits);
  check_device(grad_loss, "grad_loss", logits);
  check_device(coefficients, "coefficients", logits);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  if (z.count > 0 && z.columns > 0)
    run(dtype,
        GradCall{z, g, targets_of(target, std::nullopt), grad_loss.const_data_ptr<float>(),
                 coefficients.const_data_ptr<float>(), vocab_start, (int)ranked},
        logits);
}

Tensor grad(const Tensor& logits, const Tensor& target, const Tensor& grad_loss, const Tensor& coefficients,
            int64_t vocab_start, int64_t ranked) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  Tensor out = torch::stable::empty_like(logits);
  write_gradient(logits, target, grad_loss, coefficients, vocab_start, ranked, out);
  return out;
}

void grad_(Tensor logits, const Tensor& target, const Tensor& grad_loss, const Tensor& coefficients,
           int64_t vocab_start, int64_t ranked) {
  write_gradient(logits, target, grad_loss, coefficients, vocab_start, ranked, logits);
}

std::tuple<Tensor, Tensor> one_pass_(Tensor logits, const Tensor& target, const Tensor& grad_loss, int64_t ranked,
                                     int64_t top_k, bool entropy, double beta, double lambda_head, double lambda_tail,
                                     std::optional<int64_t> ignore_index) {
  const Dtype dtype = dtype_of(logits, "logits");
  const Rows z = rows_of(logits, "logits");
  check_one_pass(z, target, grad_loss, ranked, top_k);
  check_device(target, "target", logits);
  check_device(grad_loss, "grad_loss", logits);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  // A GPU without clusters, a row too long for one, or more keys than are ranked while it streams past: the same in two
  // passes.
  if (launcher_for(logits).layout(dtype, z.columns, (int)top_k).blocks == 0) {
    const auto [numbers, keys] = stats(logits, target, 0, ranked, top_k, entropy, ignore_index);
    const auto [loss, coefficients, token_stats] =
        combine(torch::stable::unsqueeze(numbers, 0), torch::stable::unsqueeze(keys, 0), target, beta, lambda_head,
                lambda_tail, ignore_index);
    grad_(logits, target, grad_loss, coefficients, 0, ranked);
    return {loss, token_stats};
  }
  Tensor loss = torch::stable::new_empty(logits, {z.count}, ScalarType::Float);
  Tensor stats = torch::stable::new_empty(logits, {kStats, z.count}, ScalarType::Float);
  if (z.count > 0)
    run(dtype,
        OnePassCall{z,
                    targets_of(target, ignore_index),
                    grad_loss.const_data_ptr<float>(),
                    (int)ranked,
                    (int)top_k,
                    entropy,
                    {beta, lambda_head, lambda_tail},
                    loss.mutable_data_ptr<float>(),
                    stats.mutable_data_ptr<float>()},
        logits);
  return {loss, stats};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_ptrl, CUDA, m) {
  m.impl("reward_shaped_ce_stats", TORCH_BOX(&stats));
  m.impl("reward_shaped_ce_combine", TORCH_BOX(&combine));
  m.impl("reward_shaped_ce_grad", TORCH_BOX(&grad));
  m.impl("reward_shaped_ce_grad_", TORCH_BOX(&grad_));
  m.impl("reward_shaped_ce_one_pass_", TORCH_BOX(&one_pass_));
}
