// Which kernel serves a call, and with how many blocks. `launch` and `Stream` are the device's or the emulation's.
#pragma once

#include "reward_shaped_ce_kernels.cuh"
#include "reward_shaped_ce_one_pass.cuh"

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

struct OnePassCall {
  Rows logits;  // then the gradient
  Targets targets;
  const float* grad_loss;
  int ranked, top_k;
  bool entropy;
  Shaping shaping;
  float *loss, *stats;
};

// How a row is laid out over a cluster; no blocks where it cannot be.
struct Layout {
  int blocks, stretch;
};

// Threads of a block. `kRow` is for the kernels with one block per row.
template <int kRow, int kOther>
struct Launcher {
  Stream stream;
  // Bytes of a row that one block of a cluster should hold. With 32 KiB four blocks fit on a multiprocessor, so that
  // some read while others write; longer stretches follow only where a cluster has no more blocks.
  int64_t stretch_bytes = 32 * 1024;

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

  template <class T>
  static auto one_pass_for(int top_k, bool entropy) {
    return top_k > 0 ? (entropy ? &one_pass_kernel<T, true, true, kRow> : &one_pass_kernel<T, false, true, kRow>)
           : entropy ? &one_pass_kernel<T, true, false, kRow>
                     : &one_pass_kernel<T, false, false, kRow>;
  }

  template <class T>
  Layout layout(int64_t columns, int top_k) const {
    if (top_k > kMostFused<kRow>) return {0, 0};
    const int64_t declared = top_k > 0 ? sizeof(OnePassShared<T, true, kRow>) : sizeof(OnePassShared<T, false, kRow>);
    const int64_t room = room_in_cluster(one_pass_for<T>(top_k, true), declared);
    for (int blocks = 1; blocks <= kMostBlocks; blocks *= 2) {
      const int64_t loads = ((columns + blocks - 1) / blocks + kPerLoad<T> - 1) / kPerLoad<T>;
      if (loads * (int64_t)sizeof(Loaded) > stretch_bytes && blocks < kMostBlocks) continue;
      const int stretch = (int)loads * kPerLoad<T>;
      if (one_pass_bytes<T, kRow>(stretch, blocks, top_k) <= room) return {blocks, stretch};
    }
    return {0, 0};
  }

  template <class T>
  void run(const OnePassCall& c) const {
    const Layout to = layout<T>(c.logits.columns, c.top_k);
    launch_clusters(one_pass_for<T>(c.top_k, c.entropy), c.logits.count, to.blocks, kRow,
                    one_pass_bytes<T, kRow>(to.stretch, to.blocks, c.top_k), stream, c.logits, c.targets, c.grad_loss,
                    c.ranked, c.top_k, to.blocks, to.stretch, c.shaping, c.loss, c.stats);
  }

  Layout layout(Dtype dtype, int64_t columns, int top_k) const {
    return with(dtype, [&](auto type) { return layout<decltype(type)>(columns, top_k); });
  }

  template <class Call>
  void operator()(Dtype dtype, const Call& call) const {
    with(dtype, [&](auto type) { run<decltype(type)>(call); });
  }

 private:
  template <class Do>
  static auto with(Dtype dtype, Do&& what) {
    if (dtype == Dtype::kFloat) return what(Float{});
    return dtype == Dtype::kHalf ? what(Half{}) : what(BFloat16{});
  }
};

}  // namespace ptrl
