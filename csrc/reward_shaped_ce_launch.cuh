// Which kernel serves a call, and with how many blocks. `launch` and `Stream` are the device's or the emulation's.
#pragma once

#include "reward_shaped_ce_kernels.cuh"

namespace ptrl {

enum class Dtype { kBFloat16, kHalf, kFloat };

struct StatsCall {
  Rows logits;
  Targets targets;
  int64_t vocab_start;
  int ranked, top_k;
  bool entropy;
  float* numbers;
  void* keys;
};

struct CombineCall {
  const float* numbers;
  const void* keys;
  Targets targets;
  int shards;
  int64_t rows;
  int top_k;
  Shaping shaping;
  float *loss, *coefficients, *stats;
};

struct GradCall {
  Rows logits, grad;
  Targets targets;
  const float *grad_loss, *coefficients;
  int64_t vocab_start;
  int ranked;
};

// Threads of a block. `kRow` is for the kernels with one block per row.
template <int kRow, int kOther>
struct Launcher {
  Stream stream;

  template <class T>
  void run(const StatsCall& c) const {
    auto* keys = static_cast<typename T::Raw*>(c.keys);
    const bool fused = c.top_k > 0 && c.top_k <= kMostFused<kRow>;
    const auto kernel = fused ? (c.entropy ? &stats_kernel<T, true, true, kRow> : &stats_kernel<T, false, true, kRow>)
                        : c.entropy ? &stats_kernel<T, true, false, kRow>
                                    : &stats_kernel<T, false, false, kRow>;
    launch(kernel, c.logits.count, kRow, stream, c.logits, c.targets, c.vocab_start, c.ranked, c.top_k, c.numbers,
           keys);
    if (c.top_k > 0 && !fused)
      launch(&top_k_kernel<T, kRow>, c.logits.count, kRow, stream, c.logits, c.targets, c.ranked, c.top_k, c.numbers,
             keys);
  }

  template <class T>
  void run(const CombineCall& c) const {
    constexpr int kRowsPerBlock = kOther / 32;
    launch(&combine_kernel<T, kOther>, (c.rows + kRowsPerBlock - 1) / kRowsPerBlock, kOther, stream, c.numbers,
           static_cast<const typename T::Raw*>(c.keys), c.targets, c.shards, c.rows, c.top_k, c.shaping, c.loss,
           c.coefficients, c.stats);
  }

  template <class T>
  void run(const GradCall& c) const {
    constexpr int64_t kColumns = (int64_t)kOther * kPerLoad<T> * kLoadsPerThread;
    const int tiles = (int)((c.logits.columns + kColumns - 1) / kColumns);
    launch(&grad_kernel<T, kOther>, c.logits.count * tiles, kOther, stream, c.logits, c.grad, c.targets, c.grad_loss,
           c.coefficients, c.vocab_start, c.ranked, tiles);
  }

  template <class Call>
  void operator()(Dtype dtype, const Call& call) const {
    switch (dtype) {
      case Dtype::kBFloat16:
        return run<BFloat16>(call);
      case Dtype::kHalf:
        return run<Half>(call);
      case Dtype::kFloat:
        return run<Float>(call);
    }
  }
};

}  // namespace ptrl
