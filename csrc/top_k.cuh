// The k largest logits of a row while it streams past one block, exact, ties counted.
//
// `bound` never exceeds the k-th largest ranked logit. Keys above it are appended to a buffer in shared memory, logits
// equal to it are counted. It rises to the k-th largest of the threads' maxima, and to the k-th largest of a full
// buffer. Rising leaves entries in the buffer that are no longer above it: whoever reads the buffer compares first.
#pragma once

#include "logits.cuh"
#include "rows.h"

namespace ptrl {

// Unsigned integers in the order of the floats.
template <class T>
__device__ inline typename T::Key key_of(float x) {
  using Key = typename T::Key;
  constexpr Key kSign = (Key)((Key)1 << (8 * sizeof(Key) - 1));
  const Key raw = from_float<T>(x + 0.f);  // -0 and 0 are one value
  return (Key)(raw & kSign ? ~raw : raw | kSign);
}
template <class T>
__device__ inline typename T::Raw raw_of(typename T::Key key) {
  using Key = typename T::Key;
  constexpr Key kSign = (Key)((Key)1 << (8 * sizeof(Key) - 1));
  return (Key)(key & kSign ? key & ~kSign : ~key);
}

// Sums over a block. Two sets of slots in turn: one barrier, because a set is written again only behind the next one.
template <int kThreads>
struct BlockSum {
  int (*slots)[kThreads / 32];
  int turn = 0;

  __device__ const int* share(int of_warp) {
    int* sums = slots[turn ^= 1];
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = of_warp;
    __syncthreads();
    return sums;
  }
  __device__ int operator()(int mine) {
    const int* sums = share((int)__reduce_add_sync(~0u, (unsigned)mine));
    int sum = 0;
    for (int warp = 0; warp < kThreads / 32; warp++) sum += sums[warp];
    return sum;
  }
};

template <class T, int kThreads>
struct Candidates {
  static constexpr int kTile = kThreads * kPerLoad<T>, kRoom = 4 * kTile;
  typename T::Key keys[kRoom];
  int count;
  int sums[2][kThreads / 32];
};

// A full buffer is cut to fewer than k and must then hold another tile; the sort at the end is quadratic in k.
template <int kThreads>
constexpr int kMostFused = 4 * kThreads;

template <class T, int kThreads>
class TopK {
  using Key = typename T::Key;
  using Shared = Candidates<T, kThreads>;
  static_assert(kMostFused<kThreads> <= Shared::kRoom - Shared::kTile);

 public:
  __device__ TopK(Shared& shared, int k) : shared_(shared), k_(k), block_sum_{shared.sums} {}

  __device__ void begin() {
    if (threadIdx.x == 0) shared_.count = 0;
    __syncthreads();
  }

  // Every thread of the block, tile by tile; NaN is what is not ranked.
  template <int kCount>
  __device__ void consider(int tile, const float (&z)[kCount]) {
    const float top = largest(z);
    max_ = fmaxf(max_, top);
    if (tile == look_at_) look(tile);
    if (!(top >= bound_)) return;
    int above = 0;
#pragma unroll
    for (int j = 0; j < kCount; j++) {
      above += z[j] > bound_;
      ties_ += z[j] == bound_;
    }
    if (above == 0) return;
    int at = atomicAdd(&shared_.count, above);
#pragma unroll
    for (int j = 0; j < kCount; j++)
      if (z[j] > bound_) shared_.keys[at++] = key_of<T>(z[j]);
  }

  // Writes the k largest in descending order, -inf where there are fewer; returns how many ranked logits are equal to
  // the k-th. The order of the appends was chance, the sorted list is not.
  __device__ int finish(typename T::Raw* list) {
    __syncthreads();
    const int count = shared_.count;
    if (count_if(count, [&](Key key) { return key > key_of<T>(bound_); }) >= k_) raise(kth_key(count));
    const Key bound = key_of<T>(bound_);
    const int ties = block_sum_(ties_ + mine_if(count, [&](Key key) { return key == bound; }));
    const int kept = keep_above(count, bound);
    for (int i = threadIdx.x; i < kept; i += kThreads) {
      const Key key = shared_.keys[i];
      int place = 0;
      for (int j = 0; j < kept; j++) {
        const Key other = shared_.keys[j];
        place += other > key || (other == key && j < i);
      }
      list[place] = raw_of<T>(key);
    }
    for (int i = kept + threadIdx.x; i < k_; i += kThreads) list[i] = raw_of<T>(bound);
    return ties;
  }

 private:
  // Now and then: raises the bound and makes room. Tiles are looked at in doubling steps, since the maxima of few tiles
  // say much about the next ones, and as soon as the buffer might not hold another tile.
  __device__ void look(int tile) {
    if (tile >= raise_at_) {
      raise_at_ = 2 * tile + 1;
      if (k_ <= kThreads) {
        const Key bound = kth_maximum();
        if (bound > key_of<T>(bound_)) raise(bound);
      }
    }
    __syncthreads();
    int count = shared_.count;
    __syncthreads();  // nobody appends before all have read
    if (count > Shared::kRoom - Shared::kTile) {
      const Key key = kth_key(count);
      if (key > key_of<T>(bound_)) raise(key);
      const Key bound = key_of<T>(bound_);
      ties_ += mine_if(count, [&](Key key) { return key == bound; });
      count = keep_above(count, bound);
    }
    const int fitting = (Shared::kRoom - count) / Shared::kTile;
    look_at_ = min(tile + fitting, raise_at_);
  }

  __device__ void raise(Key bound) {
    bound_ = T::to_float(raw_of<T>(bound));
    ties_ = 0;
  }

  // A lower bound of the k-th largest maximum: k threads have met a logit that reaches it. Sixteen bits will do.
  __device__ Key kth_maximum() {
    constexpr int kShift = 8 * sizeof(Key) - 16;
    const uint32_t key = key_of<T>(max_) >> kShift;
    uint32_t found = 0;
#pragma unroll 1
    for (uint32_t bit = 1u << 15; bit > 0; bit >>= 1)
      if (__syncthreads_count(key >= (found | bit)) >= k_) found |= bit;
    return (Key)(found << kShift);
  }

  // The k-th largest of the buffer, which holds at least k.
  __device__ Key kth_key(int count) {
    uint32_t found = 0;
#pragma unroll 1
    for (uint32_t bit = 1u << (8 * sizeof(Key) - 1); bit > 0; bit >>= 1)
      if (count_if(count, [&](Key key) { return key >= (found | bit); }) >= k_) found |= bit;
    return (Key)found;
  }

  // Moves the keys above the bound to the front and returns their number, which becomes the buffer's count.
  __device__ int keep_above(int count, Key bound) {
    __syncthreads();
    if (threadIdx.x == 0) shared_.count = 0;
#pragma unroll 1
    for (int first = 0; first < count; first += kThreads) {
      const int i = first + threadIdx.x;
      const Key key = i < count ? shared_.keys[i] : (Key)0;
      __syncthreads();  // nothing is written over before it is read: what is kept is at most what was read
      if (key > bound) shared_.keys[atomicAdd(&shared_.count, 1)] = key;
      __syncthreads();
    }
    __syncthreads();
    const int kept = shared_.count;
    __syncthreads();  // nobody appends before all have read
    return kept;
  }

  template <class Predicate>
  __device__ int mine_if(int count, Predicate predicate) {
    int mine = 0;
    for (int i = threadIdx.x; i < count; i += kThreads) mine += predicate(shared_.keys[i]);
    return mine;
  }

  template <class Predicate>
  __device__ int count_if(int count, Predicate predicate) {
    return block_sum_(mine_if(count, predicate));
  }

  Shared& shared_;
  const int k_;
  float bound_ = -INFINITY, max_ = -INFINITY;
  int ties_ = 0;  // this thread's logits equal to the bound since it last rose
  int look_at_ = 0, raise_at_ = 0;
  BlockSum<kThreads> block_sum_;
};

template <int kThreads>
struct WarpSums {
  int sums[2][kThreads / 32];
};

// The same for any k, with a read of the row for every bit of a key. One block per row; fills kTies of `numbers`.
template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads)
    top_k_kernel(Rows logits, Targets targets, int ranked, int k, float* numbers, typename T::Raw* keys) {
  using Key = typename T::Key;
  PTRL_SHARED(WarpSums<kThreads>, shared);
  const int64_t row = blockIdx.x;
  if (targets.skip(row)) return;
  const auto* z = reinterpret_cast<const typename T::Raw*>(logits[row]);
  typename T::Raw* list = keys + row * k;
  BlockSum<kThreads> block_sum{shared.sums};

  const auto count_if = [&](auto predicate) {
    int mine = 0;
    for (int i = threadIdx.x; i < ranked; i += kThreads) mine += predicate(key_of<T>(T::to_float(z[i])));
    return block_sum(mine);
  };
  uint32_t found = 0;
#pragma unroll 1
  for (uint32_t bit = 1u << (8 * sizeof(Key) - 1); bit > 0; bit >>= 1)
    if (count_if([&](Key key) { return key >= (found | bit); }) >= k) found |= bit;
  const Key kth = max((Key)found, key_of<T>(-INFINITY));  // below that only NaN and nothing at all
  const int ties = count_if([&](Key key) { return key == kth; });

  int kept = 0;  // in the order of the columns, so that the list is the same every time
#pragma unroll 1
  for (int first = 0; first < ranked; first += kThreads) {
    const int i = first + threadIdx.x;
    const Key key = i < ranked ? key_of<T>(T::to_float(z[i])) : (Key)0;
    const unsigned above = __ballot_sync(~0u, key > kth);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int before = __popc(above & ((1u << lane) - 1)), all = 0;
    const int* counts = block_sum.share(__popc(above));
    for (int w = 0; w < kThreads / 32; w++) {
      if (w < warp) before += counts[w];
      all += counts[w];
    }
    if (key > kth) list[kept + before] = raw_of<T>(key);
    kept += all;
  }
  for (int i = kept + threadIdx.x; i < k; i += kThreads) list[i] = raw_of<T>(kth);
  if (threadIdx.x == 0) numbers[row * kNumbers + kTies] = (float)ties;
}

}  // namespace ptrl
