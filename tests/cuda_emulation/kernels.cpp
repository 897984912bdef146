// The launches of csrc/ under the emulation, for ctypes. Blocks are small, so that few columns fill their buffers.
#include "device.h"

#include <string>

#include "reward_shaped_ce_launch.cuh"

using namespace ptrl;

namespace {

Launcher<64, 64> launcher{};

Rows rows_of(void* base, int64_t item, const int64_t* sizes, const int64_t* strides, int64_t dims) {
  Rows rows;
  if (!find_rows(base, item, sizes, strides, dims, rows)) throw std::runtime_error("too many dimensions");
  return rows;
}

// What went wrong, or null.
template <class Call>
const char* run(int dtype, const Call& call) {
  static std::string message;
  try {
    launcher((Dtype)dtype, call);
    return nullptr;
  } catch (const std::runtime_error& error) {
    message = error.what();
    return message.c_str();
  }
}

int64_t item_of(int dtype) { return (Dtype)dtype == Dtype::kFloat ? 4 : 2; }

}  // namespace

extern "C" {

void seed(unsigned value) { emulation::chance.seed(value); }

// Bytes of a row that a block of a cluster should hold.
void stretch(int64_t bytes) { launcher.stretch_bytes = bytes; }

// Blocks of the cluster for a row, as on a GPU and as in the emulation.
int blocks(int dtype, int64_t columns, int64_t top_k, int on_gpu) {
  return on_gpu ? Launcher<256, 256>{}.layout((Dtype)dtype, columns, (int)top_k).blocks
                : launcher.layout((Dtype)dtype, columns, (int)top_k).blocks;
}

const char* stats(int dtype, void* logits, const int64_t* sizes, const int64_t* strides, int64_t dims,
                  const int64_t* target, int64_t vocab_start, int64_t ranked, int64_t top_k, int entropy, int ignoring,
                  int64_t ignore_index, float* numbers, void* keys) {
  const Rows rows = rows_of(logits, item_of(dtype), sizes, strides, dims);
  return run(dtype, StatsCall{rows,
                              {target, ignoring != 0, ignore_index},
                              vocab_start,
                              (int)ranked,
                              (int)top_k,
                              entropy != 0,
                              numbers,
                              keys});
}

const char* combine(int dtype, const float* numbers, const void* keys, const int64_t* target, int64_t shards,
                    int64_t rows, int64_t top_k, double beta, double lambda_head, double lambda_tail, int ignoring,
                    int64_t ignore_index, float* loss, float* coefficients, float* stats) {
  return run(dtype, CombineCall{numbers,
                                keys,
                                {target, ignoring != 0, ignore_index},
                                (int)shards,
                                rows,
                                (int)top_k,
                                {beta, lambda_head, lambda_tail},
                                loss,
                                coefficients,
                                stats});
}

const char* grad(int dtype, void* logits, void* grad, const int64_t* sizes, const int64_t* strides,
                 const int64_t* grad_strides, int64_t dims, const int64_t* target, const float* grad_loss,
                 const float* coefficients, int64_t vocab_start, int64_t ranked) {
  const Rows z = rows_of(logits, item_of(dtype), sizes, strides, dims);
  const Rows g = rows_of(grad, item_of(dtype), sizes, grad_strides, dims);
  return run(dtype, GradCall{z, g, {target, false, 0}, grad_loss, coefficients, vocab_start, (int)ranked});
}

const char* one_pass(int dtype, void* logits, const int64_t* sizes, const int64_t* strides, int64_t dims,
                     const int64_t* target, const float* grad_loss, int64_t ranked, int64_t top_k, int entropy,
                     double beta, double lambda_head, double lambda_tail, int ignoring, int64_t ignore_index,
                     float* loss, float* stats) {
  const Rows rows = rows_of(logits, item_of(dtype), sizes, strides, dims);
  return run(dtype, OnePassCall{rows,
                                {target, ignoring != 0, ignore_index},
                                grad_loss,
                                (int)ranked,
                                (int)top_k,
                                entropy != 0,
                                {beta, lambda_head, lambda_tail},
                                loss,
                                stats});
}
}
