// Row maths of the reward-shaped cross entropy: totals of a row -> loss, gradient coefficients, statistics.
//
// A row is one token's logits z over the whole vocabulary; x is its target, K its head (top-k, ties in).
//   p_x = softmax(z)_x   q = 1 - p_x   w = p_x^(1 - q^beta)
//   loss = -w log p_x - lambda_head P_head - lambda_tail P_tail
//   dloss/dz_j = p_j (W - lambda_j), dloss/dz_x = p_x (W - w) - w q,  W = w + lambda_head P_head + lambda_tail P_tail
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define PTRL_HOST_DEVICE __host__ __device__
#else
#define PTRL_HOST_DEVICE
#endif

namespace ptrl {

constexpr double kLowest = -std::numeric_limits<double>::infinity();

// Columns of `numbers`, what one vocabulary shard knows of a row. All exponentials are relative to the shard's maximum.
enum Number { kMax, kOthers, kPadded, kWeighted, kTarget, kTies, kWidth, kNumbers };

// Columns of `coefficients`, what the backward needs of a row.
enum Coefficient { kShift, kHeadFactor, kTailFactor, kPaddedFactor, kTargetGradient, kThreshold, kCoefficients };

// Rows of `stats`, what is reported of a token.
enum Stat { kLogprob, kEntropy, kHeadMass, kTargetInHead, kStats };

struct Shaping {
  double beta, lambda_head, lambda_tail;
};

// Sums over part of a row, relative to the part's maximum. The target is counted in `max` but left out of the sums, so
// that 1 - p_x is a sum of its own and not what is left of 1.
struct Totals {
  double max = kLowest;
  double others = 0;    // e^(z - max) over real tokens
  double padded = 0;    // e^(z - max) over the columns that only pad the vocabulary
  double weighted = 0;  // (z - max) e^(z - max) over both, for the entropy
  double target = 0;    // z_x where the target is in this part, else 0
};

PTRL_HOST_DEVICE inline void rescale(Totals& part, double max) {
  if (part.max == kLowest) {  // nothing finite in it, hence nothing to rescale
    part.max = max;
    return;
  }
  const double shift = part.max - max, scale = exp(shift);
  part.weighted = scale * (part.weighted + shift * (part.others + part.padded));
  part.others *= scale;
  part.padded *= scale;
  part.max = max;
}

PTRL_HOST_DEVICE inline void add(Totals& row, Totals part) {
  const double max = part.max > row.max ? part.max : row.max;
  rescale(row, max);
  rescale(part, max);
  row.others += part.others;
  row.padded += part.padded;
  row.weighted += part.weighted;
  row.target += part.target;
}

// Not waiting for a GPU to check its targets, so that one which is no token is loud: loss and gradient are NaN.
PTRL_HOST_DEVICE inline void check_target(Totals& row, int64_t target, double columns) {
  if (!(0 <= target && target < columns)) row.target = std::numeric_limits<double>::quiet_NaN();
}

// `head` is the sum of e^(z - max) over K without the target, `threshold` the smallest logit of K.
PTRL_HOST_DEVICE inline void shape_row(const Totals& row, double head, float threshold, const Shaping& shaping,
                                       float* loss, float* coefficients, float* stats, int64_t stat_stride) {
  const double others = row.others + row.padded, at_target = exp(row.target - row.max), total = others + at_target;
  const double p = at_target / total, q = others / total;
  const bool likely = at_target > others;
  const double log_p = likely ? -log1p(others / at_target) : row.target - row.max - log(total);
  const double log_q = likely ? log(q) : log1p(-p);
  // The limit is 1 at both ends, where the formula would give inf x 0.
  const bool at_an_end = others == 0 || at_target == 0;
  const double w = shaping.beta == 0 || at_an_end ? 1 : exp(-expm1(shaping.beta * log_q) * log_p);

  const double tail = row.others < head ? 0 : (row.others - head) / total;
  const double reward = shaping.lambda_head * head / total + shaping.lambda_tail * tail;
  *loss = (float)(-w * log_p - reward);

  coefficients[kShift] = (float)row.max;
  coefficients[kHeadFactor] = (float)((w + reward - shaping.lambda_head) / total);
  coefficients[kTailFactor] = (float)((w + reward - shaping.lambda_tail) / total);
  coefficients[kPaddedFactor] = (float)((w + reward) / total);
  coefficients[kTargetGradient] = (float)(p * reward - w * q);
  coefficients[kThreshold] = threshold;

  const double weighted = row.weighted + (at_target == 0 ? 0 : at_target * (row.target - row.max));
  stats[kLogprob * stat_stride] = (float)log_p;
  stats[kEntropy * stat_stride] = (float)(log(total) - weighted / total);
  stats[kHeadMass * stat_stride] = (float)(head / total);
  stats[kTargetInHead * stat_stride] = (float)row.target >= threshold;
}

}  // namespace ptrl
