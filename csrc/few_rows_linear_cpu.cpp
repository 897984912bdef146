// x W^T for a few rows of x on CPUs, as in each step of generation: W is read once, as it lies, without a packed copy.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "checks.h"
#include "cpu_vectors.h"

namespace {

using namespace ptrl;
using torch::stable::Tensor;

constexpr int64_t kOutputs = 16;   // accumulators: outputs times one vector of rows, half of AVX-512's registers
constexpr int64_t kStretch = 256;  // products under one fp32 sum, whose error grows with their number

// kCount rows of W, the next ones of which are fetched meanwhile (short rows far apart are too much for the hardware:
// 15 % on Zen 4), times kFloats rows of x, which lie transposed: the k-th numbers of all rows from x + k * kFloats on.
template <int64_t kCount>
PTRL_INLINE void tile(const float* w, const float* x, int64_t inputs, float* out) {
  Floats total[kCount] = {};
  for (int64_t begin = 0; begin < inputs; begin += kStretch) {
    const int64_t end = std::min(begin + kStretch, inputs);
    Floats sum[kCount] = {};
    for (int64_t line = begin; line < end; line += kFloats) {
      for (int64_t n = 0; n < kCount; n++) __builtin_prefetch(w + (kCount + n) * inputs + line, 0, 2);
      const int64_t line_end = std::min(line + kFloats, end);
#pragma GCC unroll 4
      for (int64_t k = line; k < line_end; k++)
        for (int64_t n = 0; n < kCount; n++) sum[n] += w[n * inputs + k] * load_floats(x + k * kFloats);
    }
    for (int64_t n = 0; n < kCount; n++) total[n] += sum[n];
  }
  for (int64_t n = 0; n < kCount; n++) store_floats(total[n], out + n * kFloats);
}

PTRL_PER_ISA void whole_tile(const float* w, const float* x, int64_t inputs, float* out) {
  tile<kOutputs>(w, x, inputs, out);
}

PTRL_PER_ISA void single_output(const float* w, const float* x, int64_t inputs, float* out) {
  tile<1>(w, x, inputs, out);
}

// (rows, inputs) -> (rows / kFloats, inputs, kFloats), zeros where there is no row.
std::vector<float> transposed(const float* x, int64_t rows, int64_t inputs) {
  std::vector<float> out((rows + kFloats - 1) / kFloats * inputs * kFloats);
  for (int64_t row = 0; row < rows; row++)
    for (int64_t k = 0; k < inputs; k++)
      out[(row / kFloats * inputs + k) * kFloats + row % kFloats] = x[row * inputs + k];
  return out;
}

Tensor few_rows_linear(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() == 2, "x has shape ", shape_text(x.sizes()), ", expected (rows, inputs)");
  STD_TORCH_CHECK(weight.dim() == 2, "weight has shape ", shape_text(weight.sizes()), ", expected (outputs, inputs)");
  const int64_t rows = x.size(0), inputs = x.size(1), outputs = weight.size(0);
  PTRL_CHECK_SHAPE(weight, outputs, inputs);
  PTRL_CHECK_TYPE(x, Float);
  PTRL_CHECK_TYPE(weight, Float);
  PTRL_CHECK_CONTIGUOUS(x);
  PTRL_CHECK_CONTIGUOUS(weight);

  Tensor out = torch::stable::new_empty(x, {rows, outputs});
  float* y = out.mutable_data_ptr<float>();
  const float* w = weight.const_data_ptr<float>();
  const std::vector<float> turned = transposed(x.const_data_ptr<float>(), rows, inputs);
  const int64_t tiles = (outputs + kOutputs - 1) / kOutputs;
  torch::stable::parallel_for(0, tiles, 8, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * kOutputs; n < std::min(end * kOutputs, outputs); n += kOutputs) {
      const int64_t count = std::min(kOutputs, outputs - n);
      // All rows before the next tile: its part of W stays in the cache.
      for (int64_t first = 0; first < rows; first += kFloats) {
        const float* from = turned.data() + first * inputs;
        float sums[kOutputs * kFloats];
        if (count == kOutputs)
          whole_tile(w + n * inputs, from, inputs, sums);
        else
          for (int64_t i = 0; i < count; i++) single_output(w + (n + i) * inputs, from, inputs, sums + i * kFloats);
        for (int64_t row = first; row < std::min(rows, first + kFloats); row++)
          for (int64_t i = 0; i < count; i++) y[row * outputs + n + i] = sums[i * kFloats + row - first];
      }
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_ptrl, CPU, m) { m.impl("few_rows_linear", TORCH_BOX(&few_rows_linear)); }
