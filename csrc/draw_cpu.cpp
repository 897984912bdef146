// A token from each row of logits, and its log-probability, on CPUs: the row is read twice, once from the cache.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "checks.h"
#include "cpu_vectors.h"

namespace {

using namespace ptrl;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 256;  // columns under one fp32 sum, and those among which a token is looked for one by one

struct Drawn {
  int64_t token;
  double logprob;
};

// One row of logits. Those below `lowest` have no share in the softmax.
template <class T>
class Row {
  using Raw = typename T::Raw;
  using W = Wide<T>;

 public:
  PTRL_INLINE Row(const void* z, int64_t columns, float temperature, float lowest)
      : z_(static_cast<const Raw*>(z)),
        columns_(columns),
        scale_(temperature == 0 ? 1.f : 1.f / temperature),
        lowest_(lowest),
        max_(largest()) {}

  // softmax(logits / temperature) where `uniform` falls among its running sums; the argmax, for certain, at 0.
  PTRL_INLINE Drawn draw(bool greedy, double uniform, std::vector<double>& sums) const {
    // Also where all are -inf: no probabilities.
    if (!(std::abs(max_) < std::numeric_limits<float>::infinity())) return {0, std::nan("")};
    if (greedy) return {argmax(), 0};
    double total = 0;
    sums.clear();
    for (int64_t j = 0; j < columns_; j += kBlock) {
      sums.push_back(sum(j, std::min(j + kBlock, columns_)));
      total += sums.back();
    }
    const int64_t token = find(uniform * total, sums);
    return {token, (double)exponent(at(token)) - std::log(total)};
  }

 private:
  PTRL_INLINE float at(int64_t j) const { return T::to_float((uint32_t)z_[j]); }

  template <class F>
  PTRL_INLINE F exponent(F z) const {
    return (z - max_) * scale_;
  }

  // NaN where a logit is NaN or +inf.
  PTRL_INLINE float largest() const {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    Floats top = Floats{} - kInfinity;
    Words finite = ~Words{};
    const int64_t whole = columns_ / W::kLogits * W::kLogits;
    for (int64_t j = 0; j < whole; j += W::kLogits)
      for (const Floats& x : W::load(z_ + j).parts) {
        finite &= (Words)(x < kInfinity);
        top = x > top ? x : top;
      }
    float max = -kInfinity;
    bool all = true;
    for (int64_t lane = 0; lane < kFloats; lane++) {
      all = all && finite[lane] != 0;
      max = std::max(max, top[lane]);
    }
    for (int64_t j = whole; j < columns_; j++) {
      all = all && at(j) < kInfinity;
      max = std::max(max, at(j));
    }
    return all ? max : std::numeric_limits<float>::quiet_NaN();
  }

  PTRL_INLINE float sum(int64_t begin, int64_t end) const {
    Floats total = {};
    const int64_t whole = begin + (end - begin) / W::kLogits * W::kLogits;
    for (int64_t j = begin; j < whole; j += W::kLogits)
      for (const Floats& x : W::load(z_ + j).parts) {
        const Floats e = exp_clamped<6>(clamp_exponent(exponent(x)));
        total += x >= lowest_ ? e : Floats{};
      }
    float rest = 0;
    for (int64_t j = whole; j < end; j++) rest += weight(j);
    return sum_of(total) + rest;
  }

  PTRL_INLINE float weight(int64_t j) const {
    return at(j) >= lowest_ ? exp_clamped<6>(clamp_exponent(exponent(at(j)))) : 0;
  }

  // The first token whose running sum of weights is above `mark`.
  PTRL_INLINE int64_t find(double mark, const std::vector<double>& sums) const {
    double until = 0;
    int64_t block = 0, last = 0;
    for (; block < (int64_t)sums.size() && until + sums[block] <= mark; block++) {
      until += sums[block];
      if (sums[block] > 0) last = block;
    }
    // Rounding may leave the mark behind all weights: then it is the last token of any weight.
    if (block == (int64_t)sums.size()) {
      block = last;
      mark = std::numeric_limits<double>::infinity();
    }
    int64_t token = block * kBlock;
    for (int64_t j = token; j < std::min((block + 1) * kBlock, columns_); j++) {
      const double w = weight(j);
      if (w > 0) token = j;
      until += w;
      if (until > mark) break;
    }
    return token;
  }

  PTRL_INLINE int64_t argmax() const {
    int64_t best = 0;
    for (int64_t j = 1; j < columns_; j++)
      if (at(j) > at(best)) best = j;
    return best;
  }

  const Raw* z_;
  const int64_t columns_;
  const float scale_, lowest_, max_;
};

// target_clones does not go with templates, hence one plain function for each dtype.
#define PTRL_DEFINE_DRAW(T)                                                                                    \
  PTRL_PER_ISA void draw_##T(const void* z, int64_t columns, double temperature, double uniform, float lowest, \
                             std::vector<double>& sums, Drawn& drawn) {                                        \
    drawn = Row<T>(z, columns, (float)temperature, lowest).draw(temperature == 0, uniform, sums);              \
  }

PTRL_DEFINE_DRAW(BFloat16)
PTRL_DEFINE_DRAW(Half)
PTRL_DEFINE_DRAW(Float)

auto draw_for(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::BFloat16:
      return &draw_BFloat16;
    case ScalarType::Half:
      return &draw_Half;
    case ScalarType::Float:
      return &draw_Float;
    default:
      STD_TORCH_CHECK(false, "logits have scalar type number ", (int)logits.scalar_type(),
                      ", expected bfloat16, float16 or float32");
  }
}

std::tuple<Tensor, Tensor> draw(const Tensor& logits, const Tensor& temperature, const Tensor& uniform,
                                const Tensor& lowest) {
  const auto draw_row = draw_for(logits);
  const Rows z = rows_of(logits, "logits");
  const int64_t rows = z.count;
  PTRL_CHECK_TYPE(temperature, Double);
  PTRL_CHECK_TYPE(uniform, Double);
  PTRL_CHECK_TYPE(lowest, Float);
  PTRL_CHECK_SHAPE(temperature, rows);
  PTRL_CHECK_SHAPE(uniform, rows);
  PTRL_CHECK_SHAPE(lowest, rows);
  PTRL_CHECK_CONTIGUOUS(temperature);
  PTRL_CHECK_CONTIGUOUS(uniform);
  PTRL_CHECK_CONTIGUOUS(lowest);

  Tensor token = torch::stable::new_empty(temperature, {rows}, ScalarType::Long);
  Tensor logprob = torch::stable::new_empty(temperature, {rows});
  const double *t = temperature.const_data_ptr<double>(), *u = uniform.const_data_ptr<double>();
  const float* low = lowest.const_data_ptr<float>();
  int64_t* ids = token.mutable_data_ptr<int64_t>();
  double* values = logprob.mutable_data_ptr<double>();
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> sums;
    for (int64_t row = begin; row < end; row++) {
      Drawn drawn;
      draw_row(z[row], z.columns, t[row], u[row], low[row], sums, drawn);
      ids[row] = drawn.token;
      values[row] = drawn.logprob;
    }
  });
  return {token, logprob};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_ptrl, CPU, m) { m.impl("draw", TORCH_BOX(&draw)); }
