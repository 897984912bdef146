// Logits as vectors of floats and as ordered integers, in plain C++ and vector extensions: the compiler makes the
// instructions of the machine of it, one function after another, see PTRL_PER_ISA.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define PTRL_PER_ISA __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PTRL_PER_ISA
#endif
#define PTRL_INLINE inline __attribute__((always_inline))

namespace ptrl {

constexpr int64_t kVectorBytes = 64;
typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
constexpr int64_t kFloats = kVectorBytes / sizeof(float);

// Floats for Words, float for uint32_t: what follows is written once for one number and for a vector of them.
template <class W>
using FloatOf = std::conditional_t<std::is_same_v<W, Words>, Floats, float>;
template <class F>
using WordOf = std::conditional_t<std::is_same_v<F, Floats>, Words, uint32_t>;

template <class To, class From>
PTRL_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// The formats of a logit. A raw one of 16 bits is the low half of its word, the high half is 0.
struct BFloat16 {
  using Raw = uint16_t;
  using Key = int16_t;
  static constexpr Raw kMinusInfinity = 0xff80;
  template <class W>
  static PTRL_INLINE FloatOf<W> to_float(W raw) {
    return bits<FloatOf<W>>(raw << 16);
  }
  template <class F>
  static PTRL_INLINE WordOf<F> from_float(F x) {  // to nearest, ties to even
    const auto u = bits<WordOf<F>>(x);
    return (u + 0x7fff + (u >> 16 & 1)) >> 16;
  }
};

struct Half {
  using Raw = uint16_t;
  using Key = int16_t;
  static constexpr Raw kMinusInfinity = 0xfc00;
  template <class W>
  static PTRL_INLINE FloatOf<W> to_float(W raw) {
    using F = FloatOf<W>;
    const W magnitude = (raw & 0x7fff) << 13, sign = (raw & 0x8000) << 16;
    const W normal = magnitude + (112u << 23), special = magnitude | (255u << 23);
    // A subnormal is its mantissa times 2^-24: put it behind a known leading one and take that away.
    const W subnormal = bits<W>(bits<F>(normal + (1u << 23)) - bits<F>(W{} + (113u << 23)));
    const W u = magnitude >= 0x0f800000 ? special : (magnitude < 0x00800000 ? subnormal : normal);
    return bits<F>(u | sign);
  }
  template <class F>
  static PTRL_INLINE WordOf<F> from_float(F x) {  // to nearest, ties to even
    using W = WordOf<F>;
    const W u = bits<W>(x), magnitude = u & 0x7fffffff, sign = u >> 16 & 0x8000;
    const W normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    // Adding 1/2 lets the float addition round to multiples of 2^-24.
    const W subnormal = bits<W>(bits<F>(magnitude) + 0.5f) - bits<uint32_t>(0.5f);
    const W infinite = W{} + 0x7c00, special = magnitude > 0x7f800000 ? infinite + 0x200 : infinite;
    return sign | (magnitude >= 0x477ff000 ? special : (magnitude < (113u << 23) ? subnormal : normal));
  }
};

struct Float {
  using Raw = uint32_t;
  using Key = int32_t;
  static constexpr Raw kMinusInfinity = 0xff800000;
  template <class W>
  static PTRL_INLINE FloatOf<W> to_float(W raw) {
    return bits<FloatOf<W>>(raw);
  }
  template <class F>
  static PTRL_INLINE WordOf<F> from_float(F x) {
    return bits<WordOf<F>>(x);
  }
};

// 64 bytes of logits. With 16 bits each, the even ones and the odd ones: that takes no shuffle.
template <class T>
struct Wide {
  using Raw = typename T::Raw;
  static constexpr int64_t kLogits = kVectorBytes / sizeof(Raw), kParts = kLogits / kFloats;
  Floats parts[kParts];

  static PTRL_INLINE Wide load(const Raw* z) {
    Words words;
    std::memcpy(&words, z, sizeof words);
    if constexpr (kParts == 1)
      return {{T::to_float(words)}};
    else
      return {{T::to_float(words & 0xffff), T::to_float(words >> 16)}};
  }
  PTRL_INLINE void store(Raw* z) const {
    Words words = T::from_float(parts[0]);
    if constexpr (kParts == 2) words |= T::from_float(parts[1]) << 16;
    std::memcpy(z, &words, sizeof words);
  }
};

// Integers in the order of the floats that have their bits; its own inverse. -0 comes before 0.
template <class Key>
PTRL_INLINE Key ordered(Key key) {
  static_assert(std::is_integral_v<Key>);
  return key ^ ((key >> (8 * sizeof(Key) - 1)) & std::numeric_limits<Key>::max());
}

// The same with -0 and 0 as one value.
template <class T>
PTRL_INLINE typename T::Key key_of(typename T::Raw raw) {
  const auto key = ordered(bits<typename T::Key>(raw));
  return key == -1 ? 0 : key;
}
template <class T>
PTRL_INLINE typename T::Raw raw_of(typename T::Key key) {
  return bits<typename T::Raw>(ordered(key));
}
constexpr float kVanishing = -88.f;  // e^x below is 0, as fp32 would turn denormal soon after

// x, at least kVanishing, for x <= 0. NaN becomes kVanishing.
template <class F>
PTRL_INLINE F clamp_exponent(F x) {
  // The bits of negative floats grow as they fall, and unsigned integers have a minimum in one instruction.
  const auto u = bits<WordOf<F>>(x), lowest = WordOf<F>{} + bits<uint32_t>(kVanishing);
  return bits<F>(u < lowest ? u : lowest);
}

// e^x for kVanishing <= x <= 0, relative error 3e-6, 9e-8 or 2e-9 by degree; 0 at kVanishing.
template <int kDegree, class F>
PTRL_INLINE F exp_clamped(F x) {
  // Adding 3 x 2^22 rounds to an integer that ends up in the low bits. The 127 is the exponent's bias: at kVanishing
  // the exponent field becomes 0, and so does the scale.
  constexpr float kRound = 12582912.f + 127.f;
  const F shifted = x * 1.44269504f + kRound, t = x - (shifted - kRound) * 0.693147181f;
  const F scale = bits<F>(bits<WordOf<F>>(shifted) << 23);
  // Least worst relative error on |t| <= ln 2 / 2.
  if constexpr (kDegree == 4)
    return scale * (1.f + t * (0.999966773f + t * (0.500030198f + t * (0.167875916f + t * 0.041513683f))));
  if constexpr (kDegree == 5)
    return scale * (1.f + t * (0.999999706f +
                               t * (0.499991478f + t * (0.166676381f + t * (0.0418981596f + t * 0.00829027211f)))));
  return scale *
         (1.f + t * (1.00000003f +
                     t * (0.499999942f +
                          t * (0.166664308f + t * (0.0416680047f + t * (0.00837419561f + t * 0.00138436067f))))));
}

PTRL_INLINE float sum_of(Floats x) {
  float lanes[kFloats];
  std::memcpy(lanes, &x, sizeof lanes);
  for (int64_t half = kFloats / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

PTRL_INLINE Floats load_floats(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

PTRL_INLINE void store_floats(Floats x, float* to) { std::memcpy(to, &x, sizeof x); }

}  // namespace ptrl
