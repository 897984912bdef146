// The reward-shaped cross entropy in one pass, for whole rows and an upstream gradient that is known: a logit is read
// once and written once, where two passes read it twice. A row waits for its coefficients in the shared memory of a
// cluster of blocks: each does with its stretch what a rank does with its shard, joins what all of them say of theirs,
// and writes the gradient of its own.
#pragma once

#include "stretch.cuh"

namespace ptrl {

constexpr int kMostBlocks = 8;  // of a cluster: what every GPU with clusters can hold

// What a block says of its stretch, for its peers to read.
template <class T, bool kRank, int kThreads>
struct Said {
  float numbers[kNumbers];
  typename T::Raw list[kRank ? kMostFused<kThreads> : 1];
};

struct Joined {
  float loss, coefficients[kCoefficients], stats[kStats];
};

template <class T, bool kRank, int kThreads>
struct OnePassShared {
  ScanShared<T, kRank, kThreads> scan;
  Said<T, kRank, kThreads> said;
  float every_numbers[kMostBlocks * kNumbers];
  Joined joined;
};

// Dynamic shared memory: the logits of a stretch in whole tiles, then the lists of all blocks.
template <class T, int kThreads>
PTRL_HOST_DEVICE constexpr int64_t loads_of(int stretch) {
  constexpr int kTile = kThreads * kPerLoad<T>;
  return (int64_t)(stretch + kTile - 1) / kTile * kThreads;
}
template <class T, int kThreads>
constexpr int64_t one_pass_bytes(int stretch, int blocks, int top_k) {
  return loads_of<T, kThreads>(stretch) * (int64_t)sizeof(Loaded) + (int64_t)blocks * top_k * sizeof(typename T::Raw);
}

// One cluster of `blocks` per row, which covers `stretch` columns with each. With kRank, top_k is at most
// kMostFused<kThreads>. 1024 threads on a multiprocessor have 64 registers each.
template <class T, bool kEntropy, bool kRank, int kThreads>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    one_pass_kernel(Rows logits, Targets targets, const float* grad_loss, int ranked, int top_k, int blocks,
                    int stretch, Shaping shaping, float* loss, float* stats) {
  using Raw = typename T::Raw;
  using Shared = OnePassShared<T, kRank, kThreads>;
  constexpr int kCount = kPerLoad<T>, kTile = kThreads * kCount;
  constexpr int kAhead = 6;  // tiles on their way: 24 KiB a block of 256 threads
  PTRL_SHARED(Shared, shared);
  PTRL_DYNAMIC_SHARED(Loaded, kept);
  Raw* every_list = reinterpret_cast<Raw*>(kept + loads_of<T, kThreads>(stretch));

  const int64_t row = blockIdx.x / blocks;
  const int block = (int)(blockIdx.x % blocks), thread = threadIdx.x;
  const int64_t begin = (int64_t)block * stretch;
  const int columns = (int)min((int64_t)stretch, max(logits.columns - begin, (int64_t)0));
  const Stretch mine(columns, (int)(ranked - begin), targets.ids[row] - begin);
  Raw* z_row = reinterpret_cast<Raw*>(logits[row]) + begin;
  const bool aligned = is_aligned(z_row);

  if (targets.skip(row)) {  // all blocks of the cluster do
    const float nothing[kCount] = {};
    for (int first = thread * kCount; first < columns; first += kTile)
      store<T>(z_row, first, columns, aligned, nothing);
    if (block > 0) return;
    if (thread == 0) loss[row] = 0;
    if (thread < kStats) stats[thread * logits.count + row] = 0;
    return;
  }

  // A thread reads what it has itself asked for: no barrier.
  const auto ask = [&](int tile) {
    const int first = tile * kTile + thread * kCount;
    Loaded* to = kept + tile * kThreads + thread;
    if (aligned && first + kCount <= columns)
      copy_16_bytes(to, z_row + first);
    else if (tile * (int64_t)kTile < columns)
      *to = load<T>(z_row, first, columns, false);
    close_copies();
  };
  for (int tile = 0; tile < kAhead; tile++) ask(tile);
  const auto fetch = [&](int tile) {
    ask(tile + kAhead);
    wait_for_copies<kAhead>();
    return kept[tile * kThreads + thread];
  };
  scan<T, kEntropy, kRank, kThreads>(shared.scan, z_row, mine, top_k, shared.said.numbers, shared.said.list, fetch);

  cluster_arrive();
  cluster_wait();
  for (int i = thread; i < blocks * kNumbers; i += kThreads)
    shared.every_numbers[i] = peer(shared.said.numbers, i / kNumbers)[i % kNumbers];
  if (kRank)
    for (int i = thread; i < blocks * top_k; i += kThreads)
      every_list[i] = peer(shared.said.list, i / top_k)[i % top_k];
  cluster_arrive();  // no block ends, and its shared memory with it, before all have read: waited for at the end
  __syncthreads();
  if (thread < 32)
    join<T>(shared.every_numbers, kNumbers, every_list, top_k, blocks, kRank ? top_k : 0, targets.ids[row], shaping,
            &shared.joined.loss, shared.joined.coefficients, shared.joined.stats, 1);
  __syncthreads();

  if (block == 0 && thread == 0) loss[row] = shared.joined.loss;
  if (block == 0 && thread < kStats) stats[thread * logits.count + row] = shared.joined.stats[thread];
  const Gradient gradient(shared.joined.coefficients, grad_loss[row]);
  for (int tile = 0; tile * (int64_t)kTile < columns; tile++) {
    const int first = tile * kTile + thread * kCount;
    float z[kCount];
    unpack<T>(kept[tile * kThreads + thread], z);
    gradient.write_over(z, first, mine);
    store<T>(z_row, first, columns, aligned, z);
  }
  cluster_wait();
}

}  // namespace ptrl
