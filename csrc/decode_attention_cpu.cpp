// Attention of one new token for each row to what its slot of the KV cache holds, on CPUs: turns query and key, appends
// key and value in place, and reads of each slot what its row has, without a mask.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "checks.h"
#include "cpu_vectors.h"

namespace {

using namespace ptrl;
using torch::stable::Tensor;

// Rotary angles of one row; no cos, no turn.
struct Turn {
  const float *cos, *sin;
  bool interleaved;
};

PTRL_INLINE void turn(const float* x, const Turn& by, int64_t d, float scale, float* out) {
  const int64_t half = d / 2;
  for (int64_t i = 0; i < d; i++) {
    float value = x[i];
    if (by.cos) {
      const float other = by.interleaved ? (i % 2 ? x[i - 1] : -x[i + 1]) : (i < half ? -x[i + half] : x[i - half]);
      value = value * by.cos[i] + other * by.sin[i];
    }
    out[i] = value * scale;
  }
}

PTRL_INLINE float dot(const float* a, const float* b, int64_t d) {
  Floats sum = {};
  for (int64_t i = 0; i < d; i += kFloats) sum += load_floats(a + i) * load_floats(b + i);
  typedef int32_t Lanes __attribute__((vector_size(kVectorBytes)));
  sum += __builtin_shuffle(sum, Lanes{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
  sum += __builtin_shuffle(sum, Lanes{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
  sum += __builtin_shuffle(sum, Lanes{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
  return sum[0] + sum[1];
}

// Scores to e^(score - max), in place; the first `count` of an array that is padded to whole vectors. Returns the sum.
PTRL_INLINE float exponentials(float* scores, int64_t count) {
  const float max = *std::max_element(scores, scores + count);
  std::fill(scores + count, scores + (count + kFloats - 1) / kFloats * kFloats,
            -std::numeric_limits<float>::infinity());
  Floats sum = {};
  for (int64_t t = 0; t < count; t += kFloats) {
    const Floats e = exp_clamped<6>(clamp_exponent(load_floats(scores + t) - max));
    store_floats(e, scores + t);
    sum += e;
  }
  // A score that is not finite would be clamped away.
  return std::abs(max) < std::numeric_limits<float>::infinity() ? sum_of(sum) : std::numeric_limits<float>::quiet_NaN();
}

// kVectors vectors of columns of the weighted sum of values that are `d` floats apart.
template <int64_t kVectors>
PTRL_INLINE void weighted_sum(const float* weights, const float* values, int64_t count, int64_t d, float norm,
                              float* out) {
  Floats sum[kVectors] = {};
  for (int64_t t = 0; t < count; t++)
    for (int64_t v = 0; v < kVectors; v++) sum[v] += weights[t] * load_floats(values + t * d + v * kFloats);
  for (int64_t v = 0; v < kVectors; v++) store_floats(sum[v] * norm, out + v * kFloats);
}

// The heads of one group of one row, whose key and value become number `at` of those that the slot holds.
struct Group {
  const float *query, *key, *value;
  float *keys, *values;
  float* out;
  int64_t heads, d, at;
};

PTRL_PER_ISA void attend(const Group& group, const Turn& by, float scale, float* turned, float* scores) {
  const int64_t d = group.d, count = group.at + 1;
  turn(group.key, by, d, 1, group.keys + group.at * d);
  std::copy_n(group.value, d, group.values + group.at * d);
  for (int64_t head = 0; head < group.heads; head++) {
    turn(group.query + head * d, by, d, scale, turned);
    for (int64_t t = 0; t < count; t++) scores[t] = dot(turned, group.keys + t * d, d);
    const float norm = 1 / exponentials(scores, count);
    int64_t i = 0;
    float* out = group.out + head * d;
    for (; i + 4 * kFloats <= d; i += 4 * kFloats) weighted_sum<4>(scores, group.values + i, count, d, norm, out + i);
    for (; i < d; i += kFloats) weighted_sum<1>(scores, group.values + i, count, d, norm, out + i);
  }
}

void check_dense(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.stride(2) == 1, name, " has strides ", shape_text(x.strides()),
                  ", expected the last dimension to be dense");
}

const float* angles_of(const std::optional<Tensor>& angles, int64_t rows, int64_t d) {
  if (!angles) return nullptr;
  const Tensor& cos_or_sin = *angles;
  PTRL_CHECK_TYPE(cos_or_sin, Float);
  PTRL_CHECK_SHAPE(cos_or_sin, rows, d);
  PTRL_CHECK_CONTIGUOUS(cos_or_sin);
  return cos_or_sin.const_data_ptr<float>();
}

Tensor decode_attention(const Tensor& query, const Tensor& key, const Tensor& value, std::optional<Tensor> cos,
                        std::optional<Tensor> sin, bool interleaved, double scale, const Tensor& positions, Tensor keys,
                        Tensor values) {
  STD_TORCH_CHECK(query.dim() == 3, "query has shape ", shape_text(query.sizes()), ", expected (rows, heads, d)");
  STD_TORCH_CHECK(keys.dim() == 4, "keys have shape ", shape_text(keys.sizes()), ", expected (slots, groups, room, d)");
  const int64_t rows = query.size(0), heads = query.size(1), d = query.size(2);
  const int64_t slots = keys.size(0), groups = keys.size(1), room = keys.size(2);
  PTRL_CHECK_SHAPE(key, rows, groups, d);
  PTRL_CHECK_SHAPE(value, rows, groups, d);
  PTRL_CHECK_SHAPE(keys, slots, groups, room, d);
  PTRL_CHECK_SHAPE(values, slots, groups, room, d);
  PTRL_CHECK_SHAPE(positions, rows);
  PTRL_CHECK_TYPE(query, Float);
  PTRL_CHECK_TYPE(key, Float);
  PTRL_CHECK_TYPE(value, Float);
  PTRL_CHECK_TYPE(keys, Float);
  PTRL_CHECK_TYPE(values, Float);
  PTRL_CHECK_TYPE(positions, Long);
  PTRL_CHECK_CONTIGUOUS(keys);
  PTRL_CHECK_CONTIGUOUS(values);
  PTRL_CHECK_CONTIGUOUS(positions);
  check_dense(query, "query");
  check_dense(key, "key");
  check_dense(value, "value");
  STD_TORCH_CHECK(d % kFloats == 0, "heads have size ", d, ", expected a multiple of ", kFloats);
  STD_TORCH_CHECK(heads <= 1 || query.stride(1) == d, "query has strides ", shape_text(query.strides()),
                  ", expected the heads of a row to follow on each other");
  STD_TORCH_CHECK(groups > 0 && heads % groups == 0, "query has ", heads, " heads, expected a multiple of ", groups);
  STD_TORCH_CHECK(rows <= slots, "query has ", rows, " rows, expected at most one for each of ", slots, " slots");
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "cos and sin: expected both or none");
  const int64_t* at = positions.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < rows; row++)
    STD_TORCH_CHECK(0 <= at[row] && at[row] < room, "position is ", at[row], ", expected 0 to ", room - 1);

  Tensor context = torch::stable::new_empty(query, {rows, heads * d});
  const float *q = query.const_data_ptr<float>(), *k = key.const_data_ptr<float>(), *v = value.const_data_ptr<float>();
  const float *cosines = angles_of(cos, rows, d), *sines = angles_of(sin, rows, d);
  float *kept_keys = keys.mutable_data_ptr<float>(), *kept_values = values.mutable_data_ptr<float>();
  float* out = context.mutable_data_ptr<float>();
  const int64_t each = heads / groups;
  torch::stable::parallel_for(0, rows * groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> turned(d), scores(room + kFloats);
    for (int64_t i = begin; i < end; i++) {
      const int64_t row = i / groups, g = i % groups;
      const Group group{q + row * query.stride(0) + g * each * d,
                        k + row * key.stride(0) + g * key.stride(1),
                        v + row * value.stride(0) + g * value.stride(1),
                        kept_keys + i * room * d,
                        kept_values + i * room * d,
                        out + (row * heads + g * each) * d,
                        each,
                        d,
                        at[row]};
      const Turn by{cosines ? cosines + row * d : nullptr, cosines ? sines + row * d : nullptr, interleaved};
      attend(group, by, (float)scale, turned.data(), scores.data());
    }
  });
  return context;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_ptrl, CPU, m) { m.impl("decode_attention", TORCH_BOX(&decode_attention)); }
