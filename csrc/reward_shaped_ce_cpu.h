// What the CPU operators ask of the loops over logits, which exist once per dtype.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "reward_shaped_ce.h"

namespace ptrl {

// Some columns of one row. `ranked` and `target` count from its first column and may lie outside of it.
struct Segment {
  const void* logits;
  int64_t columns;
  int64_t ranked;
  int64_t target;
};

// Buffers of one thread, kept from row to row.
struct Scratch {
  std::vector<char> groups, coarse, candidates;
};

// The sum of e^(z - max) over the head without the target, and the smallest logit of the head.
struct Head {
  double sum = 0;
  float threshold = std::numeric_limits<float>::infinity();
};

struct Kernels {
  // Totals and the k largest ranked logits, the k-th last, with how many are equal to it.
  void (*stats)(const Segment&, int64_t k, bool entropy, Scratch&, Totals&, void* keys, int64_t& ties);
  // The k largest of several such lists, `stride` bytes apart, and how many logits are equal to the k-th.
  int64_t (*merge)(const void* lists, int64_t stride, const int64_t* ties, int64_t count, int64_t k, Scratch&,
                   void* keys);
  Head (*head)(const void* keys, int64_t k, int64_t ties, float max, float target);
  void (*gradient)(const Segment&, const float* coefficients, float upstream, void* grad);
};

extern const Kernels kBFloat16Kernels, kHalfKernels, kFloatKernels;

}  // namespace ptrl
