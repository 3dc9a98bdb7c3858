// Counter-based random numbers, the same words as tdm_fast/philox.py: Philox4x32-10 (Salmon et al., SC 2011) with
//
//   key      low and high word of the seed
//   counter  element / 4, global sample index, iteration, stream | purpose << 16
//
// and normals from them by Box-Muller, within 1e-6 of float64 although every step is float32.
#pragma once

#include "maths.h"

namespace tdm_fast {

constexpr uint32_t purpose_renoise = 1, purpose_intervals = 2;

// What all draws of one call share. A pointer, where not null, is a number on the kernel's device and stands in place of
// the value, so that a captured CUDA graph does not freeze it.
struct Draw {
  const int64_t *seed_data, *iteration_data;
  int64_t seed, iteration;
  int64_t sample_offset;  // global index of sample 0
  uint32_t stream, purpose;
};

struct PhiloxKey {
  uint32_t seed_low, seed_high, sample, iteration, stream_and_purpose;
};

struct Words {
  uint32_t w0, w1, w2, w3;
};

TDM_FAST_INLINE PhiloxKey philox_key(const Draw& draw, int64_t sample_index) {
  const uint64_t seed = static_cast<uint64_t>(draw.seed_data != nullptr ? *draw.seed_data : draw.seed);
  const int64_t iteration = draw.iteration_data != nullptr ? *draw.iteration_data : draw.iteration;
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
          static_cast<uint32_t>(draw.sample_offset + sample_index), static_cast<uint32_t>(iteration),
          draw.stream | draw.purpose << 16};
}

// The four words of block `block`, for the elements 4 * block to 4 * block + 3.
TDM_FAST_INLINE Words philox(const PhiloxKey& key, uint32_t block) {
  uint32_t c0 = block, c1 = key.sample, c2 = key.iteration, c3 = key.stream_and_purpose;
  uint32_t k0 = key.seed_low, k1 = key.seed_high;
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t left = static_cast<uint64_t>(c0) * 0xD2511F53u, right = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(right >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(right);
    c2 = static_cast<uint32_t>(left >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(left);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// A word to an integer in [0, bound), for a bound below 2^31.
TDM_FAST_INLINE int64_t bounded(uint32_t word, int64_t bound) { return (static_cast<int64_t>(word) * bound) >> 32; }

// Word to float, rounded once. 16 bits at a time, because vector units convert signed integers only.
TDM_FAST_INLINE float word_to_float(uint32_t word) {
  return static_cast<float>(static_cast<int32_t>(word >> 16)) * 65536.0f +
         static_cast<float>(static_cast<int32_t>(word & 0xffffu));
}

// sqrt(-2 ln u), u = (word + 0.5) / 2^32.
TDM_FAST_INLINE float normal_radius(uint32_t word) {
  // u = m * 2^e with m in [sqrt(1/2), sqrt(2)), f = m - 1. Above sqrt(1/2) u itself is m; there 1 - u is taken from the
  // complement of the word, an integer, since u as a float has lost the digits that ln u begins with.
  const float scaled = (word_to_float(word) + 0.5f) * 0x1p-32f;
  const int32_t shifted = static_cast<int32_t>(float_bits(scaled) - 0x3f3504f3u);
  const int32_t exponent = shifted >> 23;
  const float mantissa = float_from_bits(float_bits(scaled) - (static_cast<uint32_t>(exponent) << 23));
  // Both are computed, then one is chosen: a branch would keep the compiler from vector code.
  const float above = -((word_to_float(~word) + 0.5f) * 0x1p-32f), below = mantissa - 1.0f;
  const float below_exponent = static_cast<float>(exponent);
  const float f = exponent >= 0 ? above : below;
  const float e = exponent >= 0 ? 0.0f : below_exponent;
  // ln(1 + f) = f - f^2/2 + f^3 p(f): p is a Chebyshev fit on [sqrt(1/2) - 1, sqrt(2) - 1].
  float p = 0.06971611471f;
  p = multiply_add(p, f, -0.1147973385f);
  p = multiply_add(p, f, 0.1168541992f);
  p = multiply_add(p, f, -0.1242568733f);
  p = multiply_add(p, f, 0.1424905765f);
  p = multiply_add(p, f, -0.1666780232f);
  p = multiply_add(p, f, 0.2000071575f);
  p = multiply_add(p, f, -0.2499999696f);
  p = multiply_add(p, f, 0.3333333118f);
  const float square = f * f;
  // ln 2 in two parts, the first with zeros at its end so that its product with e is exact.
  float rest = multiply_add(e, -2.12194440e-4f, square * (f * p));
  rest = multiply_add(square, -0.5f, rest);
  const float logarithm = multiply_add(e, 0.693359375f, f + rest);
  return square_root(-2.0f * logarithm);
}

struct Pair {
  float first, second;
};

// (cos, sin) of 2 pi (word + 0.5) / 2^32.
TDM_FAST_INLINE Pair unit_vector(uint32_t word) {
  // The nearest multiple of a quarter turn comes off in integers; what is left, in quarter turns, is in [-1/2, 1/2].
  const uint32_t quarter = (word + 0x20000000u) >> 30;
  const int32_t left = static_cast<int32_t>(word - (quarter << 30));
  const float y = (static_cast<float>(left) + 0.5f) * 0x1p-30f;
  const float square = y * y;
  // sin(pi/2 y) and cos(pi/2 y), Chebyshev fits; the first coefficient of the sine in two parts.
  float s = 0.000158206303556f;
  s = multiply_add(s, square, -0.00468126625673f);
  s = multiply_add(s, square, 0.0796925827256f);
  s = multiply_add(s, square, -0.645964096147f);
  s = multiply_add(s, square, -4.37181866e-8f);
  const float sine = multiply_add(y, 1.57079637f, y * s);
  float c = 0.000906739898403f;
  c = multiply_add(c, square, -0.0208615283422f);
  c = multiply_add(c, square, 0.253669410357f);
  c = multiply_add(c, square, -1.23370054937f);
  const float cosine = multiply_add(c, square, 1.0f);
  const bool swapped = (quarter & 1u) != 0;
  const uint32_t first = float_bits(swapped ? sine : cosine) ^ (((quarter + 1u) & 2u) << 30);
  const uint32_t second = float_bits(swapped ? cosine : sine) ^ ((quarter & 2u) << 30);
  return {float_from_bits(first), float_from_bits(second)};
}

// Box-Muller: two independent standard normals from two words.
TDM_FAST_INLINE Pair normal_pair(uint32_t first, uint32_t second) {
  const float radius = normal_radius(first);
  const Pair direction = unit_vector(second);
  return {radius * direction.first, radius * direction.second};
}

}  // namespace tdm_fast
