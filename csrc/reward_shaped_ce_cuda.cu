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

template <class Call>
void run(Dtype dtype, const Call& call, const Tensor& like) {
  constexpr int kRowThreads = 256, kOtherThreads = 256;
  Launcher<kRowThreads, kOtherThreads>{current_stream(like)}(dtype, call);
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
        CombineCall{numbers.const_data_ptr<float>(), keys.data_ptr(), targets_of(target, ignore_index), (int)shards,
                    rows, (int)top_k, {beta, lambda_head, lambda_tail}, loss.mutable_data_ptr<float>(),
                    coefficients.mutable_data_ptr<float>(), stats.mutable_data_ptr<float>()},
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_ptrl, CUDA, m) {
  m.impl("reward_shaped_ce_stats", TORCH_BOX(&stats));
  m.impl("reward_shaped_ce_combine", TORCH_BOX(&combine));
  m.impl("reward_shaped_ce_grad", TORCH_BOX(&grad));
  m.impl("reward_shaped_ce_grad_", TORCH_BOX(&grad_));
}
