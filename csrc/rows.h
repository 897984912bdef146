// Where the rows of a tensor with any leading dimensions start, its last one being dense, and which rows count.
#pragma once

#include <cstdint>

#include "reward_shaped_ce.h"

namespace ptrl {

struct Rows {
  static constexpr int kDims = 8;

  char* base = nullptr;
  int64_t count = 1, columns = 1;
  int dims = 0;                          // leading dimensions left after joining those that follow on each other
  int64_t sizes[kDims], strides[kDims];  // innermost first, strides in bytes

  PTRL_HOST_DEVICE char* operator[](int64_t row) const {
    int64_t offset = 0;
    for (int d = 0; d + 1 < dims; d++, row /= sizes[d - 1]) offset += row % sizes[d] * strides[d];
    return base + offset + (dims > 0 ? row * strides[dims - 1] : 0);
  }
};

// False when more than kDims leading dimensions are left after joining.
inline bool find_rows(void* base, int64_t item, const int64_t* sizes, const int64_t* strides, int64_t dims,
                      Rows& rows) {
  rows.base = static_cast<char*>(base);
  rows.columns = sizes[dims - 1];
  for (int64_t d = dims - 1; d-- > 0;) {
    rows.count *= sizes[d];
    if (sizes[d] == 1) continue;
    const int last = rows.dims - 1;
    if (last >= 0 && strides[d] * item == rows.sizes[last] * rows.strides[last]) {
      rows.sizes[last] *= sizes[d];
      continue;
    }
    if (rows.dims == Rows::kDims) return false;
    rows.sizes[rows.dims] = sizes[d];
    rows.strides[rows.dims++] = strides[d] * item;
  }
  return true;
}

struct Targets {
  const int64_t* ids;
  bool ignoring;
  int64_t ignored;

  PTRL_HOST_DEVICE bool skip(int64_t row) const { return ignoring && ids[row] == ignored; }
};

}  // namespace ptrl
