// The loops over logits: plain C++ and vector extensions, compiled once per instruction set and chosen at load time.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu_vectors.h"
#include "reward_shaped_ce_cpu.h"

namespace ptrl {
namespace {

constexpr int64_t kBlock = 2048;  // columns between two looks at the running maximum; their sums stay in fp32
constexpr int64_t kDepth = 16;    // logits under one group maximum

// One maximum for each lane of `kDepth` consecutive vectors.
template <class T>
struct Groups {
  using Key = typename T::Key;
  typedef Key Vector __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t kLanes = kVectorBytes / sizeof(Key), kChunk = kLanes * kDepth;

  static PTRL_INLINE Vector load(const Key* keys) {
    Vector vector;
    std::memcpy(&vector, keys, sizeof vector);
    return vector;
  }
  static PTRL_INLINE Vector load_ordered(const typename T::Raw* z) {
    Vector key;
    std::memcpy(&key, z, sizeof key);
    return key ^ ((key >> (8 * sizeof(Key) - 1)) & std::numeric_limits<Key>::max());
  }
};

template <class T>
constexpr typename T::Key kLowestKey = ~(T::kMinusInfinity & std::numeric_limits<typename T::Key>::max());  // of -inf

// How many terms e^x gets. 16-bit gradients are rounded to 2^-9 or 2^-11 of their value; sums average the error out.
template <class T>
constexpr int kGradientDegree = sizeof(typename T::Raw) == 2 ? 4 : 6;
template <class T>
constexpr int kSumDegree = sizeof(typename T::Raw) == 2 ? 5 : 6;

template <class T, bool kEntropy>
PTRL_INLINE void add_exponentials(const typename T::Raw* z, int64_t count, float max, double& sum, double& weighted) {
  using W = Wide<T>;
  Floats s[W::kParts] = {}, t[W::kParts] = {};
  const auto add = [&](const typename T::Raw* from) __attribute__((always_inline)) {
    const W wide = W::load(from);
    for (int64_t part = 0; part < W::kParts; part++) {
      const Floats x = clamp_exponent(wide.parts[part] - max), e = exp_clamped<kSumDegree<T>>(x);
      s[part] += e;
      if (kEntropy) t[part] += e * x;
    }
  };
  const int64_t whole = count / W::kLogits * W::kLogits;
  for (int64_t j = 0; j < whole; j += W::kLogits) add(z + j);
  if (whole < count) {
    typename T::Raw rest[W::kLogits];
    std::fill_n(rest, W::kLogits, T::kMinusInfinity);
    std::memcpy(rest, z + whole, (count - whole) * sizeof *rest);
    add(rest);
  }
  for (int64_t part = 0; part < W::kParts; part++) {
    sum += sum_of(s[part]);
    if (kEntropy) weighted += sum_of(t[part]);
  }
}

// Smallest and largest of some logits, as keys.
template <class Key>
struct Range {
  Key low, high;
};

// Group maxima of the whole chunks go to `groups`.
template <class T>
PTRL_INLINE Range<typename T::Key> block_range(const typename T::Raw* z, int64_t count, typename T::Key* groups) {
  using G = Groups<T>;
  using Key = typename T::Key;
  using Vector = typename G::Vector;
  Range<Key> range{std::numeric_limits<Key>::max(), std::numeric_limits<Key>::min()};
  const int64_t chunks = count / G::kChunk;
  Vector low = Vector{} + range.low, high = Vector{} + range.high;
  for (int64_t c = 0; c < chunks; c++) {
    Vector top = Vector{} + range.high;
    for (int64_t v = 0; v < kDepth; v++) {
      const Vector key = G::load_ordered(z + c * G::kChunk + v * G::kLanes);
      top = key > top ? key : top;
      low = key < low ? key : low;
    }
    std::memcpy(groups + c * G::kLanes, &top, sizeof top);
    high = top > high ? top : high;
  }
  for (int64_t lane = 0; lane < G::kLanes; lane++) {
    range.low = std::min<Key>(range.low, low[lane]);
    range.high = std::max<Key>(range.high, high[lane]);
  }
  for (int64_t j = chunks * G::kChunk; j < count; j++) {
    const Key key = ordered(bits<Key>(z[j]));
    range.low = std::min(range.low, key);
    range.high = std::max(range.high, key);
  }
  return range;
}

template <class T, bool kEntropy>
PTRL_INLINE void add_columns(const typename T::Raw* z, int64_t begin, int64_t end, int64_t target, Totals& totals,
                             double Totals::* sum, typename T::Key* groups) {
  for (int64_t b = begin; b < end; b += kBlock) {
    const int64_t e = std::min(b + kBlock, end);
    const auto range = block_range<T>(z + b, e - b, groups + (b - begin) / kDepth);
    // Infinity and NaN, which as keys lie beyond the infinities, would be clamped away.
    if (range.high >= ~kLowestKey<T> || range.low < kLowestKey<T>) {
      totals.*sum = std::numeric_limits<double>::quiet_NaN();
      continue;
    }
    const float top = T::to_float((uint32_t)raw_of<T>(range.high));
    if (top > totals.max) rescale(totals, top);
    const float max = totals.max == kLowest ? 0.f : (float)totals.max;
    const int64_t skip = target >= b && target < e ? target : e;
    add_exponentials<T, kEntropy>(z + b, skip - b, max, totals.*sum, totals.weighted);
    if (skip < e) add_exponentials<T, kEntropy>(z + skip + 1, e - skip - 1, max, totals.*sum, totals.weighted);
  }
}

// The k-th largest, or the smallest possible key when there are fewer: bit by bit, so that ties cost nothing.
template <class Key>
PTRL_INLINE Key kth_largest(const Key* keys, int64_t count, int64_t k) {
  using Unsigned = std::make_unsigned_t<Key>;
  constexpr Unsigned kSign = Unsigned(1) << (8 * sizeof(Key) - 1);
  Unsigned found = 0;
  for (Unsigned bit = kSign; bit != 0; bit >>= 1) {
    const Key trial = (Key)((found | bit) ^ kSign);
    int64_t reached = 0;
    for (int64_t b = 0; b < count; b += 16384) {  // a 16-bit counter of any one lane cannot overflow
      const int64_t e = std::min<int64_t>(b + 16384, count);
      Key part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t i = b; i < e; i++) part += keys[i] >= trial;
      reached += part;
    }
    if (reached >= k) found |= bit;
  }
  return (Key)(found ^ kSign);
}

// Lanes of `fold` chunks under one maximum: enough of them for a bound that lets few logits more than k through.
template <class T>
PTRL_INLINE int64_t fold_of(int64_t chunks, int64_t k) {
  return std::max<int64_t>(1, chunks * Groups<T>::kLanes / std::max<int64_t>(4 * k, 512));
}

template <class T>
PTRL_INLINE void fold_maxima(const typename T::Key* groups, int64_t chunks, int64_t fold, typename T::Key* maxima) {
  using G = Groups<T>;
  for (int64_t c = 0; c < chunks; c += fold) {
    auto top = G::load(groups + c * G::kLanes);
    for (int64_t f = c + 1; f < std::min(c + fold, chunks); f++) {
      const auto next = G::load(groups + f * G::kLanes);
      top = next > top ? next : top;
    }
    std::memcpy(maxima + c / fold * G::kLanes, &top, sizeof top);
  }
}

// The k largest of some keys, the k-th last, and how many of the keys are equal to it.
template <class T>
PTRL_INLINE int64_t keep_largest(const typename T::Key* keys, int64_t count, int64_t k, void* list) {
  using Key = typename T::Key;
  auto* out = static_cast<typename T::Raw*>(list);
  const Key kth = count < k ? kLowestKey<T> : kth_largest(keys, count, k);
  int64_t kept = 0, ties = 0;
  for (int64_t i = 0; i < count; i++) {
    ties += keys[i] == kth;
    if (keys[i] > kth && kept < k) out[kept++] = raw_of<T>(keys[i]);
  }
  std::fill(out + kept, out + k, raw_of<T>(kth));
  return ties;
}

template <class T>
PTRL_INLINE int64_t select_top_k(const typename T::Raw* z, int64_t ranked, const typename T::Key* groups, int64_t k,
                                 Scratch& scratch, void* list) {
  using G = Groups<T>;
  using Key = typename T::Key;
  const int64_t chunks = ranked / G::kChunk, whole = chunks * G::kChunk, fold = fold_of<T>(chunks, k);
  const int64_t coarse = (chunks + fold - 1) / fold * G::kLanes;
  scratch.coarse.resize(coarse * sizeof(Key));
  Key* maxima = reinterpret_cast<Key*>(scratch.coarse.data());
  fold_maxima<T>(groups, chunks, fold, maxima);
  // A lower bound of the k-th largest: k groups reach the k-th largest maximum. -0 ranks with 0, one below it.
  Key bound = coarse < k ? std::numeric_limits<Key>::min() : kth_largest(maxima, coarse, k);
  if (bound == 0) bound = -1;

  scratch.candidates.resize(std::max<size_t>(scratch.candidates.size(), ranked * sizeof(Key)));
  Key* candidates = reinterpret_cast<Key*>(scratch.candidates.data());
  int64_t count = 0;
  const auto consider = [&](typename T::Raw raw) __attribute__((always_inline)) {
    candidates[count] = key_of<T>(raw);
    count += ordered(bits<Key>(raw)) >= bound;
  };
  for (int64_t i = 0; i < coarse; i++) {
    if (maxima[i] < bound) continue;
    const int64_t lane = i % G::kLanes, first = i / G::kLanes * fold;
    for (int64_t c = first; c < std::min(first + fold, chunks); c++) {
      if (groups[c * G::kLanes + lane] < bound) continue;
      for (int64_t v = 0; v < kDepth; v++) consider(z[c * G::kChunk + v * G::kLanes + lane]);
    }
  }
  for (int64_t j = whole; j < ranked; j++) consider(z[j]);
  return keep_largest<T>(candidates, count, k, list);
}

template <class T, bool kEntropy>
PTRL_INLINE void segment_stats(const Segment& segment, int64_t k, Scratch& scratch, Totals& totals, void* keys,
                               int64_t& ties) {
  const auto* z = static_cast<const typename T::Raw*>(segment.logits);
  const int64_t ranked = std::clamp<int64_t>(segment.ranked, 0, segment.columns);
  scratch.groups.resize((segment.columns / kDepth + 1) * sizeof(typename T::Key));
  auto* groups = reinterpret_cast<typename T::Key*>(scratch.groups.data());
  // The padding first: its group maxima are of no use and may be overwritten.
  add_columns<T, kEntropy>(z, ranked, segment.columns, segment.target, totals, &Totals::padded, groups);
  add_columns<T, kEntropy>(z, 0, ranked, segment.target, totals, &Totals::others, groups);
  if (segment.target >= 0 && segment.target < segment.columns) totals.target = T::to_float((uint32_t)z[segment.target]);
  if (k > 0) ties = select_top_k<T>(z, ranked, groups, k, scratch, keys);
}

template <class T>
PTRL_INLINE void stats_loop(const Segment& segment, int64_t k, bool entropy, Scratch& scratch, Totals& totals,
                            void* keys, int64_t& ties) {
  if (entropy)
    segment_stats<T, true>(segment, k, scratch, totals, keys, ties);
  else
    segment_stats<T, false>(segment, k, scratch, totals, keys, ties);
}

template <class T>
PTRL_INLINE int64_t merge_loop(const void* lists, int64_t stride, const int64_t* ties, int64_t count, int64_t k,
                               Scratch& scratch, void* merged) {
  using Raw = typename T::Raw;
  using Key = typename T::Key;
  if (count == 1) {
    std::memcpy(merged, lists, k * sizeof(Raw));
    return ties[0];
  }
  scratch.candidates.resize(std::max<size_t>(scratch.candidates.size(), count * k * sizeof(Key)));
  Key* keys = reinterpret_cast<Key*>(scratch.candidates.data());
  for (int64_t c = 0; c < count; c++) {
    const Raw* list = reinterpret_cast<const Raw*>(static_cast<const char*>(lists) + c * stride);
    for (int64_t i = 0; i < k; i++) keys[c * k + i] = key_of<T>(list[i]);
  }
  int64_t tied = keep_largest<T>(keys, count * k, k, merged);
  // A list that ends in the k-th value may stand for more of it than it had room for.
  const Key kth = key_of<T>(static_cast<const Raw*>(merged)[k - 1]);
  for (int64_t c = 0; c < count; c++) {
    const Key* list = keys + c * k;
    if (list[k - 1] == kth) tied += ties[c] - std::count(list, list + k, kth);
  }
  return tied;
}

template <class T>
PTRL_INLINE Head head_loop(const void* list, int64_t k, int64_t ties, float max, float target) {
  const auto at = [&](int64_t i) { return T::to_float((uint32_t)static_cast<const typename T::Raw*>(list)[i]); };
  Head head;
  head.threshold = at(k - 1);
  int64_t target_at = 0;  // any entry that equals the target will do for it
  while (target_at < k && at(target_at) != target) target_at++;
  double above = 0;
#pragma omp simd reduction(+ : above)
  for (int64_t i = 0; i < k; i++) {
    const float x = at(i);
    above += x > head.threshold && i != target_at ? exp_clamped<kSumDegree<T>>(clamp_exponent(x - max)) : 0.f;
  }
  const double tied = (double)(ties - (target == head.threshold));
  head.sum = above + (tied > 0 ? tied * exp_clamped<kSumDegree<T>>(clamp_exponent(head.threshold - max)) : 0);
  return head;
}

template <class T>
PTRL_INLINE void scale_exponentials(const typename T::Raw* z, typename T::Raw* grad, int64_t count, float max,
                                    float threshold, float head, float tail) {
  using W = Wide<T>;
  const Floats in_head = Floats{} + head, in_tail = Floats{} + tail;
  const auto scale = [&](const typename T::Raw* from, typename T::Raw* to) __attribute__((always_inline)) {
    W wide = W::load(from);
    for (Floats& x : wide.parts)
      x = (x >= threshold ? in_head : in_tail) * exp_clamped<kGradientDegree<T>>(clamp_exponent(x - max));
    wide.store(to);
  };
  const int64_t whole = count / W::kLogits * W::kLogits;
  for (int64_t j = 0; j < whole; j += W::kLogits) scale(z + j, grad + j);
  if (whole < count) {
    typename T::Raw rest[W::kLogits] = {};
    std::memcpy(rest, z + whole, (count - whole) * sizeof *rest);
    scale(rest, rest);
    std::memcpy(grad + whole, rest, (count - whole) * sizeof *rest);
  }
}

template <class T>
PTRL_INLINE void gradient_loop(const Segment& segment, const float* c, float upstream, void* grad) {
  using Raw = typename T::Raw;
  const Raw* z = static_cast<const Raw*>(segment.logits);
  Raw* g = static_cast<Raw*>(grad);
  // An ignored token: its logits may be anything, NaN included.
  if (std::all_of(c, c + kCoefficients, [](float value) { return value == 0; })) {
    std::fill_n(g, segment.columns, (Raw)0);
    return;
  }
  // The NaN that rounding to bf16 keeps: of one with all bits set it would make a zero.
  if (std::isnan(upstream)) upstream = std::numeric_limits<float>::quiet_NaN();
  const int64_t ranked = std::clamp<int64_t>(segment.ranked, 0, segment.columns);
  const float padded = upstream * c[kPaddedFactor];
  scale_exponentials<T>(z, g, ranked, c[kShift], c[kThreshold], upstream * c[kHeadFactor], upstream * c[kTailFactor]);
  scale_exponentials<T>(z + ranked, g + ranked, segment.columns - ranked, c[kShift], c[kThreshold], padded, padded);
  if (segment.target >= 0 && segment.target < segment.columns)
    g[segment.target] = (Raw)T::from_float(upstream * c[kTargetGradient]);
}

// target_clones does not go with templates, hence one plain function for each loop and dtype.
#define PTRL_DEFINE_LOOPS(T)                                                                                       \
  PTRL_PER_ISA void stats_##T(const Segment& segment, int64_t k, bool entropy, Scratch& scratch, Totals& totals,   \
                              void* keys, int64_t& ties) {                                                         \
    stats_loop<T>(segment, k, entropy, scratch, totals, keys, ties);                                               \
  }                                                                                                                \
  PTRL_PER_ISA int64_t merge_##T(const void* lists, int64_t stride, const int64_t* ties, int64_t count, int64_t k, \
                                 Scratch& scratch, void* keys) {                                                   \
    return merge_loop<T>(lists, stride, ties, count, k, scratch, keys);                                            \
  }                                                                                                                \
  PTRL_PER_ISA Head head_##T(const void* keys, int64_t k, int64_t ties, float max, float target) {                 \
    return head_loop<T>(keys, k, ties, max, target);                                                               \
  }                                                                                                                \
  PTRL_PER_ISA void gradient_##T(const Segment& segment, const float* coefficients, float upstream, void* grad) {  \
    gradient_loop<T>(segment, coefficients, upstream, grad);                                                       \
  }

PTRL_DEFINE_LOOPS(BFloat16)
PTRL_DEFINE_LOOPS(Half)
PTRL_DEFINE_LOOPS(Float)

}  // namespace

const Kernels kBFloat16Kernels{&stats_BFloat16, &merge_BFloat16, &head_BFloat16, &gradient_BFloat16};
const Kernels kHalfKernels{&stats_Half, &merge_Half, &head_Half, &gradient_Half};
const Kernels kFloatKernels{&stats_Float, &merge_Float, &head_Float, &gradient_Float};

}  // namespace ptrl
