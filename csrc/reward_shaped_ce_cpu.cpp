// The reward-shaped cross entropy on CPUs: the operators, their checks, and how rows are dealt out to threads.
#include "reward_shaped_ce_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "kept_memory.h"

namespace {

using namespace ptrl;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const Kernels& kernels_for(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      return kBFloat16Kernels;
    case ScalarType::Half:
      return kHalfKernels;
    case ScalarType::Float:
      return kFloatKernels;
    default:
      STD_TORCH_CHECK(false, name, " has scalar type number ", (int)x.scalar_type(),
                      ", expected bfloat16, float16 or float32");
  }
}

// With few rows a row is cut into segments of at least 16384 columns. How many depends on the shape alone, so that the
// result does not depend on the number of threads.
int64_t segments_per_row(int64_t rows, int64_t columns) {
  return rows == 0 ? 1 : std::clamp<int64_t>(64 / rows, 1, std::max<int64_t>(columns / 16384, 1));
}

// A column that pads the vocabulary is nobody's target: loss and gradient become NaN.
void check_padding(Totals& sum, int64_t column, int64_t ranked, int64_t columns) {
  if (ranked <= column && column < columns) sum.target = std::numeric_limits<double>::quiet_NaN();
}

void write_numbers(const Totals& sum, int64_t ties, int64_t columns, float* numbers) {
  numbers[kMax] = (float)sum.max;
  numbers[kOthers] = (float)sum.others;
  numbers[kPadded] = (float)sum.padded;
  numbers[kWeighted] = (float)sum.weighted;
  numbers[kTarget] = (float)sum.target;
  numbers[kTies] = (float)ties;
  numbers[kWidth] = (float)columns;
}

std::tuple<Tensor, Tensor> stats(const Tensor& logits, const Tensor& target, int64_t vocab_start, int64_t ranked,
                                 int64_t top_k, bool entropy, std::optional<int64_t> ignore_index) {
  const Kernels& kernels = kernels_for(logits, "logits");
  const Rows z = rows_of(logits, "logits");
  const int64_t rows = z.count, columns = z.columns;
  check_stats(z, target, ranked, top_k);

  Tensor numbers = torch::stable::new_empty(logits, {rows, kNumbers}, ScalarType::Float);
  Tensor keys = torch::stable::new_empty(logits, {rows, top_k});
  const int64_t* targets = target.const_data_ptr<int64_t>();
  float* out = numbers.mutable_data_ptr<float>();
  char* out_keys = static_cast<char*>(keys.data_ptr());
  const int64_t list_bytes = top_k * logits.element_size();

  const int64_t parts = segments_per_row(rows, columns);
  const int64_t width = (columns + parts - 1) / parts;
  std::vector<Totals> totals(rows * parts);
  std::vector<int64_t> ties(rows * parts);
  std::vector<char> part_keys(parts > 1 ? rows * parts * list_bytes : 0);
  char* lists = parts > 1 ? part_keys.data() : out_keys;

  torch::stable::parallel_for(0, rows * parts, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t i = begin; i < end; i++) {
      const int64_t row = i / parts, first = std::min(i % parts * width, columns);
      if (ignore_index && targets[row] == *ignore_index) continue;
      const Segment segment{z[row] + first * logits.element_size(), std::min(width, columns - first), ranked - first,
                            targets[row] - vocab_start - first};
      kernels.stats(segment, top_k, entropy, scratch, totals[i], lists + i * list_bytes, ties[i]);
    }
  });

  Scratch scratch;
  for (int64_t row = 0; row < rows; row++) {
    const bool ignored = ignore_index && targets[row] == *ignore_index;
    if (ignored) std::fill_n(out_keys + row * list_bytes, list_bytes, 0);
    Totals sum;
    for (int64_t part = 0; part < parts; part++) add(sum, totals[row * parts + part]);
    int64_t tied = ties[row * parts];
    if (parts > 1 && top_k > 0 && !ignored)
      tied = kernels.merge(lists + row * parts * list_bytes, list_bytes, &ties[row * parts], parts, top_k, scratch,
                           out_keys + row * list_bytes);
    if (!ignored) check_padding(sum, targets[row] - vocab_start, ranked, columns);
    write_numbers(sum, tied, columns, out + row * kNumbers);
  }
  return {numbers, keys};
}

// Joins what the shards know of one row; consecutive shards are `number_stride` floats and `list_stride` bytes apart.
struct Combiner {
  Combiner(const Kernels& kernels, const Shaping& shaping, int64_t shards, int64_t top_k, int64_t list_bytes)
      : kernels(kernels), shaping(shaping), top_k(top_k), merged(list_bytes), ties(shards) {}

  void operator()(const float* numbers, int64_t number_stride, const char* lists, int64_t list_stride, int64_t target,
                  float* loss, float* coefficients, float* stats, int64_t stat_stride) {
    const int64_t shards = (int64_t)ties.size();
    Totals sum;
    double columns = 0;
    for (int64_t shard = 0; shard < shards; shard++) {
      const float* n = numbers + shard * number_stride;
      add(sum, {n[kMax], n[kOthers], n[kPadded], n[kWeighted], n[kTarget]});
      ties[shard] = (int64_t)n[kTies];
      columns += n[kWidth];
    }
    check_target(sum, target, columns);
    Head head;
    if (top_k > 0) {
      const int64_t tied = kernels.merge(lists, list_stride, ties.data(), shards, top_k, scratch, merged.data());
      head = kernels.head(merged.data(), top_k, tied, (float)sum.max, (float)sum.target);
    }
    shape_row(sum, head.sum, head.threshold, shaping, loss, coefficients, stats, stat_stride);
  }

  const Kernels& kernels;
  const Shaping shaping;
  const int64_t top_k;
  std::vector<char> merged;
  std::vector<int64_t> ties;
  Scratch scratch;
};

std::tuple<Tensor, Tensor, Tensor> combine(const Tensor& numbers, const Tensor& keys, const Tensor& target, double beta,
                                           double lambda_head, double lambda_tail,
                                           std::optional<int64_t> ignore_index) {
  const Kernels& kernels = kernels_for(keys, "keys");
  check_combine(numbers, keys, target);
  const int64_t shards = keys.size(0), rows = keys.size(1), top_k = keys.size(2);

  Tensor loss = torch::stable::new_empty(numbers, {rows});
  Tensor coefficients = torch::stable::new_empty(numbers, {rows, kCoefficients});
  Tensor stats = torch::stable::new_empty(numbers, {kStats, rows});
  const Shaping shaping{beta, lambda_head, lambda_tail};
  const int64_t* targets = target.const_data_ptr<int64_t>();
  const float* in = numbers.const_data_ptr<float>();
  const char* lists = static_cast<const char*>(keys.data_ptr());
  const int64_t list_bytes = top_k * keys.element_size();
  float* out_loss = loss.mutable_data_ptr<float>();
  float* out_coefficients = coefficients.mutable_data_ptr<float>();
  float* out_stats = stats.mutable_data_ptr<float>();

  torch::stable::parallel_for(0, rows, 32, [&](int64_t begin, int64_t end) {
    Combiner combine_row(kernels, shaping, shards, top_k, list_bytes);
    for (int64_t row = begin; row < end; row++) {
      if (ignore_index && targets[row] == *ignore_index) {
        out_loss[row] = 0;
        std::fill_n(out_coefficients + row * kCoefficients, (int)kCoefficients, 0.f);
        for (int64_t stat = 0; stat < kStats; stat++) out_stats[stat * rows + row] = 0;
        continue;
      }
      combine_row(in + row * kNumbers, rows * kNumbers, lists + row * list_bytes, rows * list_bytes, targets[row],
                  out_loss + row, out_coefficients + row * kCoefficients, out_stats + row, rows);
    }
  });
  return {loss, coefficients, stats};
}

constexpr int64_t kTile = 16384;

void write_tile(const Kernels& kernels, const Rows& z, const Rows& grad, int64_t row, int64_t first, int64_t ranked,
                int64_t target, const float* coefficients, float upstream, int64_t item) {
  const Segment segment{z[row] + first * item, std::min(kTile, z.columns - first), ranked - first, target - first};
  kernels.gradient(segment, coefficients, upstream, grad[row] + first * item);
}

void write_gradient(const Tensor& logits, const Tensor& target, const Tensor& grad_loss, const Tensor& coefficients,
                    int64_t vocab_start, int64_t ranked, const Tensor& grad) {
  const Kernels& kernels = kernels_for(logits, "logits");
  const Rows z = rows_of(logits, "logits"), g = rows_of(grad, "grad");
  const int64_t rows = z.count, columns = z.columns;
  check_grad(z, target, grad_loss, coefficients, ranked);

  const int64_t* targets = target.const_data_ptr<int64_t>();
  const float* upstream = grad_loss.const_data_ptr<float>();
  const float* c = coefficients.const_data_ptr<float>();
  const int64_t tiles = (columns + kTile - 1) / kTile, item = logits.element_size();
  torch::stable::parallel_for(0, rows * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t row = i / tiles, first = i % tiles * kTile;
      write_tile(kernels, z, g, row, first, ranked, targets[row] - vocab_start, c + row * kCoefficients, upstream[row],
                 item);
    }
  });
}

Tensor grad(const Tensor& logits, const Tensor& target, const Tensor& grad_loss, const Tensor& coefficients,
            int64_t vocab_start, int64_t ranked) {
  Tensor out = empty_in_kept_memory(logits);
  write_gradient(logits, target, grad_loss, coefficients, vocab_start, ranked, out);
  return out;
}

void grad_(Tensor logits, const Tensor& target, const Tensor& grad_loss, const Tensor& coefficients,
           int64_t vocab_start, int64_t ranked) {
  write_gradient(logits, target, grad_loss, coefficients, vocab_start, ranked, logits);
}

// Row by row, so that the gradient finds the logits in the core's cache. With so few rows that `stats` would cut them,
// the three operators one after the other: bit for bit the same either way.
std::tuple<Tensor, Tensor> one_pass_(Tensor logits, const Tensor& target, const Tensor& grad_loss, int64_t ranked,
                                     int64_t top_k, bool entropy, double beta, double lambda_head, double lambda_tail,
                                     std::optional<int64_t> ignore_index) {
  const Kernels& kernels = kernels_for(logits, "logits");
  const Rows z = rows_of(logits, "logits");
  const int64_t rows = z.count, columns = z.columns;
  check_stats(z, target, ranked, top_k);
  PTRL_CHECK_TYPE(grad_loss, Float);
  PTRL_CHECK_SHAPE(grad_loss, rows);
  PTRL_CHECK_CONTIGUOUS(grad_loss);
  if (segments_per_row(rows, columns) > 1) {
    const auto [numbers, keys] = stats(logits, target, 0, ranked, top_k, entropy, ignore_index);
    const auto [loss, coefficients, token_stats] =
        combine(torch::stable::unsqueeze(numbers, 0), torch::stable::unsqueeze(keys, 0), target, beta, lambda_head,
                lambda_tail, ignore_index);
    grad_(logits, target, grad_loss, coefficients, 0, ranked);
    return {loss, token_stats};
  }

  Tensor loss = torch::stable::new_zeros(logits, {rows}, ScalarType::Float);
  Tensor token_stats = torch::stable::new_zeros(logits, {kStats, rows}, ScalarType::Float);
  const int64_t* targets = target.const_data_ptr<int64_t>();
  const float* upstream = grad_loss.const_data_ptr<float>();
  float* out_loss = loss.mutable_data_ptr<float>();
  float* out_stats = token_stats.mutable_data_ptr<float>();
  const int64_t item = logits.element_size(), list_bytes = top_k * item;
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    std::vector<char> list(list_bytes);
    Combiner combine_row(kernels, {beta, lambda_head, lambda_tail}, 1, top_k, list_bytes);
    for (int64_t row = begin; row < end; row++) {
      float numbers[kNumbers], coefficients[kCoefficients] = {};
      if (!ignore_index || targets[row] != *ignore_index) {
        Totals totals, sum;
        int64_t ties = 0;
        kernels.stats({z[row], columns, ranked, targets[row]}, top_k, entropy, scratch, totals, list.data(), ties);
        add(sum, totals);
        check_padding(sum, targets[row], ranked, columns);
        write_numbers(sum, ties, columns, numbers);
        combine_row(numbers, 0, list.data(), 0, targets[row], out_loss + row, coefficients, out_stats + row, rows);
      }
      for (int64_t first = 0; first < columns; first += kTile)
        write_tile(kernels, z, z, row, first, ranked, targets[row], coefficients, upstream[row], item);
    }
  });
  return {loss, token_stats};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_ptrl, CPU, m) {
  m.impl("reward_shaped_ce_stats", TORCH_BOX(&stats));
  m.impl("reward_shaped_ce_combine", TORCH_BOX(&combine));
  m.impl("reward_shaped_ce_grad", TORCH_BOX(&grad));
  m.impl("reward_shaped_ce_grad_", TORCH_BOX(&grad_));
  m.impl("reward_shaped_ce_one_pass_", TORCH_BOX(&one_pass_));
}
