// The loops over logits: plain C++ and vector extensions, compiled once per instruction set and chosen at load time.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "reward_shaped_ce_cpu.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define PTRL_PER_ISA __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PTRL_PER_ISA
#endif
#define PTRL_INLINE inline __attribute__((always_inline))

namespace ptrl {
namespace {

template <class To, class From>
PTRL_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

struct BFloat16 {
  using Raw = uint16_t;
  using Key = int16_t;
  static PTRL_INLINE float to_float(Raw raw) { return bits<float>((uint32_t)raw << 16); }
  static PTRL_INLINE Raw from_float(float x) {  // to nearest, ties to even
    const uint32_t u = bits<uint32_t>(x);
    return (Raw)((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
};

struct Half {
  using Raw = uint16_t;
  using Key = int16_t;
  static PTRL_INLINE float to_float(Raw raw) {
    const uint32_t magnitude = (uint32_t)(raw & 0x7fff) << 13, sign = (uint32_t)(raw & 0x8000) << 16;
    const uint32_t normal = magnitude + (112u << 23), special = magnitude | (255u << 23);
    // A subnormal is its mantissa times 2^-24: put it behind a known leading one and take that away.
    const uint32_t subnormal = bits<uint32_t>(bits<float>(normal + (1u << 23)) - bits<float>(113u << 23));
    const uint32_t u = magnitude >= 0x0f800000 ? special : magnitude < 0x00800000 ? subnormal : normal;
    return bits<float>(u | sign);
  }
  static PTRL_INLINE Raw from_float(float x) {  // to nearest, ties to even
    const uint32_t u = bits<uint32_t>(x), magnitude = u & 0x7fffffff, sign = u >> 16 & 0x8000;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    // Adding 1/2 lets the float addition round to multiples of 2^-24.
    const uint32_t subnormal = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - bits<uint32_t>(0.5f);
    const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    const uint32_t h = magnitude >= 0x477ff000 ? special : magnitude < (113u << 23) ? subnormal : normal;
    return (Raw)(h | sign);
  }
};

struct Float {
  using Raw = float;
  using Key = int32_t;
  static PTRL_INLINE float to_float(Raw raw) { return raw; }
  static PTRL_INLINE Raw from_float(float x) { return x; }
};

// Integers in the order of the floats that have their bits; its own inverse.
template <class Key>
PTRL_INLINE Key ordered(Key key) {
  return key ^ ((key >> (8 * sizeof(Key) - 1)) & std::numeric_limits<Key>::max());
}
PTRL_INLINE int32_t to_key(float x) { return ordered(bits<int32_t>(x + 0.f)); }  // -0 and 0 are one value
PTRL_INLINE float from_key(int32_t key) { return bits<float>(ordered(key)); }

constexpr int64_t kBlock = 2048;  // columns between two looks at the running maximum; their sums stay in fp32
constexpr int64_t kDepth = 16;    // logits under one group maximum
constexpr int64_t kVector = 64;   // bytes

// One maximum for each lane of `kDepth` consecutive vectors.
template <class T>
struct Groups {
  using Key = typename T::Key;
  typedef Key Vector __attribute__((vector_size(kVector), aligned(alignof(Key)), may_alias));
  static constexpr int64_t kLanes = kVector / sizeof(Key), kChunk = kLanes * kDepth;

  static PTRL_INLINE Vector maxima(const typename T::Raw* z) {
    Vector top = ordered_vector(z);
    for (int64_t v = 1; v < kDepth; v++) {
      const Vector next = ordered_vector(z + v * kLanes);
      top = next > top ? next : top;
    }
    return top;
  }

 private:
  static PTRL_INLINE Vector ordered_vector(const typename T::Raw* z) {
    Vector key;
    std::memcpy(&key, z, sizeof key);
    return key ^ ((key >> (8 * sizeof(Key) - 1)) & std::numeric_limits<Key>::max());
  }
};

// How many terms e^x gets. 16-bit gradients are rounded to 2^-9 or 2^-11 of their value; sums average the error out.
template <class T>
constexpr int kGradientDegree = sizeof(typename T::Raw) == 2 ? 4 : 6;
template <class T>
constexpr int kSumDegree = sizeof(typename T::Raw) == 2 ? 5 : 6;

constexpr float kVanishing = -88.f;  // e^x below is 0, as fp32 would turn denormal soon after

// e^x for kVanishing <= x <= 0, relative error 3e-6, 9e-8 or 2e-9 by degree; 0 at kVanishing, NaN for NaN.
template <int kDegree>
PTRL_INLINE float exp_clamped(float x) {
  // Adding 3 x 2^22 rounds to an integer that ends up in the low bits. The 127 is the exponent's bias: at kVanishing
  // the exponent field becomes 0, and so does the scale.
  constexpr float kRound = 12582912.f + 127.f;
  const float shifted = x * 1.44269504f + kRound, t = x - (shifted - kRound) * 0.693147181f;
  const float scale = bits<float>(bits<uint32_t>(shifted) << 23);
  // Least worst relative error on |t| <= ln 2 / 2.
  if constexpr (kDegree == 4)
    return scale * (1.f + t * (0.999966773f + t * (0.500030198f + t * (0.167875916f + t * 0.041513683f))));
  if constexpr (kDegree == 5)
    return scale * (1.f + t * (0.999999706f + t * (0.499991478f + t * (0.166676381f + t * (0.0418981596f +
                                                                                          t * 0.00829027211f)))));
  return scale * (1.f + t * (1.00000003f + t * (0.499999942f + t * (0.166664308f + t * (0.0416680047f +
                                                           t * (0.00837419561f + t * 0.00138436067f))))));
}

PTRL_INLINE float clamp_exponent(float x) { return x < kVanishing ? kVanishing : x; }  // NaN stays

template <class T, bool kEntropy>
PTRL_INLINE void add_exponentials(const typename T::Raw* z, int64_t count, float max, double& sum, double& weighted) {
  float s = 0, t = 0;
#pragma omp simd reduction(+ : s, t)
  for (int64_t j = 0; j < count; j++) {
    const float x = clamp_exponent(T::to_float(z[j]) - max), e = exp_clamped<kSumDegree<T>>(x);
    s += e;
    if (kEntropy) t += e * x;
  }
  sum += s;
  weighted += t;
}

// Group maxima of the whole chunks go to `groups`; returns the largest logit of all columns.
template <class T>
PTRL_INLINE float block_maximum(const typename T::Raw* z, int64_t count, typename T::Key* groups) {
  using G = Groups<T>;
  using Key = typename T::Key;
  Key top = std::numeric_limits<Key>::min();
  const int64_t chunks = count / G::kChunk;
  if (chunks > 0) {
    auto all = G::maxima(z);
    std::memcpy(groups, &all, sizeof all);
    for (int64_t c = 1; c < chunks; c++) {
      const auto next = G::maxima(z + c * G::kChunk);
      std::memcpy(groups + c * G::kLanes, &next, sizeof next);
      all = next > all ? next : all;
    }
    for (int64_t lane = 0; lane < G::kLanes; lane++) top = std::max<Key>(top, all[lane]);
  }
  for (int64_t j = chunks * G::kChunk; j < count; j++) top = std::max(top, ordered(bits<Key>(z[j])));
  return T::to_float(bits<typename T::Raw>(ordered(top)));
}

template <class T, bool kEntropy>
PTRL_INLINE void add_columns(const typename T::Raw* z, int64_t begin, int64_t end, int64_t target, Totals& totals,
                             double Totals::* sum, typename T::Key* groups) {
  for (int64_t b = begin; b < end; b += kBlock) {
    const int64_t e = std::min(b + kBlock, end);
    const float top = block_maximum<T>(z + b, e - b, groups + (b - begin) / kDepth);
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

// A lower bound of the k-th largest logit: k groups reach the k-th largest group maximum.
template <class T>
PTRL_INLINE float top_k_bound(const typename T::Key* groups, int64_t chunks, int64_t k, Scratch& scratch) {
  using G = Groups<T>;
  using Key = typename T::Key;
  const int64_t fold = std::max<int64_t>(1, chunks * G::kLanes / std::max<int64_t>(4 * k, 512));
  const int64_t coarse = (chunks + fold - 1) / fold * G::kLanes;
  if (coarse < k) return -std::numeric_limits<float>::infinity();
  scratch.coarse.resize(coarse * sizeof(Key));
  Key* maxima = reinterpret_cast<Key*>(scratch.coarse.data());
  for (int64_t c = 0; c < chunks; c += fold) {
    typename G::Vector top, next;
    std::memcpy(&top, groups + c * G::kLanes, sizeof top);
    for (int64_t f = c + 1; f < std::min(c + fold, chunks); f++) {
      std::memcpy(&next, groups + f * G::kLanes, sizeof next);
      top = next > top ? next : top;
    }
    std::memcpy(maxima + c / fold * G::kLanes, &top, sizeof top);
  }
  return T::to_float(bits<typename T::Raw>(ordered(kth_largest(maxima, coarse, k))));
}

// The k largest of the candidates in `keys`, the k-th last, and how many candidates are equal to it.
template <class T>
PTRL_INLINE int64_t keep_largest(const int32_t* candidates, int64_t count, int64_t k, void* keys) {
  typename T::Raw* out = static_cast<typename T::Raw*>(keys);
  const bool short_list = count < k;
  const int32_t kth = short_list ? to_key(-std::numeric_limits<float>::infinity()) : kth_largest(candidates, count, k);
  int64_t kept = 0, ties = 0;
  for (int64_t i = 0; i < count; i++) {
    ties += candidates[i] == kth;
    if (candidates[i] > kth && kept < k) out[kept++] = T::from_float(from_key(candidates[i]));
  }
  std::fill(out + kept, out + k, T::from_float(from_key(kth)));
  return ties;
}

template <class T>
PTRL_INLINE int64_t select_top_k(const typename T::Raw* z, int64_t ranked, const typename T::Key* groups, int64_t k,
                                 Scratch& scratch, void* keys) {
  using G = Groups<T>;
  const int64_t chunks = ranked / G::kChunk, whole = chunks * G::kChunk;
  const float bound = top_k_bound<T>(groups, chunks, k, scratch);
  // -0 ranks below 0 as a key, though not as a logit.
  const typename T::Key group_bound = bound == 0 ? -1 : ordered(bits<typename T::Key>(T::from_float(bound)));
  std::vector<int32_t>& candidates = scratch.candidates;
  int64_t count = 0;
  const auto reserve = [&](int64_t more) {
    if (count + more > (int64_t)candidates.size()) candidates.resize(2 * (count + more));
  };
  const auto consider = [&](typename T::Raw raw) {
    const float x = T::to_float(raw);
    candidates[count] = to_key(x);
    count += !(x < bound);
  };
  for (int64_t c = 0; c < chunks; c++)
    for (int64_t lane = 0; lane < G::kLanes; lane++) {
      if (groups[c * G::kLanes + lane] < group_bound) continue;
      reserve(kDepth);
      for (int64_t v = 0; v < kDepth; v++) consider(z[c * G::kChunk + v * G::kLanes + lane]);
    }
  reserve(ranked - whole);
  for (int64_t j = whole; j < ranked; j++) consider(z[j]);
  return keep_largest<T>(candidates.data(), count, k, keys);
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
  if (segment.target >= 0 && segment.target < segment.columns) totals.target = T::to_float(z[segment.target]);
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
                               Scratch& scratch, void* keys) {
  using Raw = typename T::Raw;
  if (count == 1) {
    std::memcpy(keys, lists, k * sizeof(Raw));
    return ties[0];
  }
  scratch.candidates.resize(std::max<size_t>(scratch.candidates.size(), count * k));
  int32_t* candidates = scratch.candidates.data();
  for (int64_t c = 0; c < count; c++) {
    const Raw* list = reinterpret_cast<const Raw*>(static_cast<const char*>(lists) + c * stride);
    for (int64_t i = 0; i < k; i++) candidates[c * k + i] = to_key(T::to_float(list[i]));
  }
  int64_t tied = keep_largest<T>(candidates, count * k, k, keys);
  // A list that ends in the k-th value may stand for more of it than it had room for.
  const int32_t kth = to_key(T::to_float(static_cast<const Raw*>(keys)[k - 1]));
  for (int64_t c = 0; c < count; c++) {
    const int32_t* list = candidates + c * k;
    if (list[k - 1] == kth) tied += ties[c] - std::count(list, list + k, kth);
  }
  return tied;
}

template <class T>
PTRL_INLINE Head head_loop(const void* keys, int64_t k, int64_t ties, float max, float target) {
  const auto* z = static_cast<const typename T::Raw*>(keys);
  Head head;
  head.threshold = T::to_float(z[k - 1]);
  int64_t target_at = 0;  // any entry that equals the target will do for it
  while (target_at < k && T::to_float(z[target_at]) != target) target_at++;
  float above = 0;
#pragma omp simd reduction(+ : above)
  for (int64_t i = 0; i < k; i++) {
    const float x = T::to_float(z[i]);
    above += x > head.threshold && i != target_at ? exp_clamped<kSumDegree<T>>(clamp_exponent(x - max)) : 0.f;
  }
  const double tied = (double)(ties - (target == head.threshold));
  head.sum = above + (tied > 0 ? tied * exp_clamped<kSumDegree<T>>(clamp_exponent(head.threshold - max)) : 0);
  return head;
}

template <class T>
PTRL_INLINE void scale_exponentials(const typename T::Raw* z, typename T::Raw* grad, int64_t count, float max,
                                    float threshold, float head, float tail) {
#pragma omp simd
  for (int64_t j = 0; j < count; j++) {
    const float x = T::to_float(z[j]);
    grad[j] = T::from_float((x >= threshold ? head : tail) * exp_clamped<kGradientDegree<T>>(clamp_exponent(x - max)));
  }
}

template <class T>
PTRL_INLINE void gradient_loop(const Segment& segment, const float* c, float upstream, void* grad) {
  const auto* z = static_cast<const typename T::Raw*>(segment.logits);
  auto* g = static_cast<typename T::Raw*>(grad);
  // An ignored token: its logits may be anything, NaN included.
  if (std::all_of(c, c + kCoefficients, [](float value) { return value == 0; })) {
    std::fill_n(g, segment.columns, T::from_float(0));
    return;
  }
  const int64_t ranked = std::clamp<int64_t>(segment.ranked, 0, segment.columns);
  const float padded = upstream * c[kPaddedFactor];
  scale_exponentials<T>(z, g, ranked, c[kShift], c[kThreshold], upstream * c[kHeadFactor], upstream * c[kTailFactor]);
  scale_exponentials<T>(z + ranked, g + ranked, segment.columns - ranked, c[kShift], c[kThreshold], padded, padded);
  if (segment.target >= 0 && segment.target < segment.columns)
    g[segment.target] = T::from_float(upstream * c[kTargetGradient]);
}

// target_clones does not go with templates, hence one plain function for each loop and dtype.
#define PTRL_DEFINE_LOOPS(T)                                                                                        \
  PTRL_PER_ISA void stats_##T(const Segment& segment, int64_t k, bool entropy, Scratch& scratch, Totals& totals,    \
                              void* keys, int64_t& ties) {                                                          \
    stats_loop<T>(segment, k, entropy, scratch, totals, keys, ties);                                                \
  }                                                                                                                 \
  PTRL_PER_ISA int64_t merge_##T(const void* lists, int64_t stride, const int64_t* ties, int64_t count, int64_t k,  \
                                 Scratch& scratch, void* keys) {                                                    \
    return merge_loop<T>(lists, stride, ties, count, k, scratch, keys);                                             \
  }                                                                                                                 \
  PTRL_PER_ISA Head head_##T(const void* keys, int64_t k, int64_t ties, float max, float target) {                  \
    return head_loop<T>(keys, k, ties, max, target);                                                                \
  }                                                                                                                 \
  PTRL_PER_ISA void gradient_##T(const Segment& segment, const float* coefficients, float upstream, void* grad) {   \
    gradient_loop<T>(segment, coefficients, upstream, grad);                                                        \
  }

PTRL_DEFINE_LOOPS(BFloat16)
PTRL_DEFINE_LOOPS(Half)
PTRL_DEFINE_LOOPS(Float)

}  // namespace

const Kernels kBFloat16Kernels{&stats_BFloat16, &merge_BFloat16, &head_BFloat16, &gradient_BFloat16};
const Kernels kHalfKernels{&stats_Half, &merge_Half, &head_Half, &gradient_Half};
const Kernels kFloatKernels{&stats_Float, &merge_Float, &head_Float, &gradient_Float};

}  // namespace ptrl
