// ReMiT: tokens and the weight of one of them, the same on every device.
#pragma once

#include <cmath>
#include <cstdint>

#include "reward_shaped_ce.h"

namespace ptrl {

// [b, s] tokens; a segment lies within one row.
struct RemitTokens {
  const float *logprob, *reference_logprob;
  const bool* keep;
  const int64_t* segment;  // null: the row
  int64_t rows, columns, segments;

  PTRL_HOST_DEVICE int64_t count() const { return rows * columns; }
};

PTRL_HOST_DEVICE inline double remit_gap(float logprob, float reference_logprob) {
  return (double)reference_logprob - logprob;
}

// clip(2 sigmoid(gap - mean gap), 1 - epsilon, 1 + epsilon). NaN where the sum of the segment's gaps is not finite: an
// infinite mean would clip to weights that look right.
PTRL_HOST_DEVICE inline float remit_weight(double gap, double sum, double count, double epsilon) {
  if (!(fabs(sum) < INFINITY)) return NAN;
  const double weight = 2 / (1 + exp(sum / count - gap)), low = 1 - epsilon, high = 1 + epsilon;
  return (float)(weight < low ? low : weight > high ? high : weight);  // NaN stays
}

}  // namespace ptrl
