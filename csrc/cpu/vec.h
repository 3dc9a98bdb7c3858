// One vector register of floats, and how latents of each dtype are loaded into it and stored from it.
//
// Included by files that are compiled once per instruction set: TDM_FAST_ISA is the namespace (isa_default, isa_avx2,
// isa_avx512). Vec supports + - * / through the compiler's vector types, and what maths.h adds to those.
#pragma once

#include <cstdint>

#include "../dtypes.h"
#include "../maths.h"

#if defined(__AVX2__)
#include <immintrin.h>
#else
#include <torch/headeronly/util/Half.h>
#endif

#define TDM_FAST_MEMBER inline __attribute__((always_inline))

namespace tdm_fast {
namespace TDM_FAST_ISA {

#if defined(__AVX512F__)

using Vec = __m512;
constexpr int64_t width = 16;

TDM_FAST_INLINE Vec broadcast(float value) { return _mm512_set1_ps(value); }

TDM_FAST_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
TDM_FAST_INLINE Vec load(const BFloat16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
TDM_FAST_INLINE Vec load(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

TDM_FAST_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
TDM_FAST_INLINE void store(BFloat16* p, Vec v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(result));
}
TDM_FAST_INLINE void store(Half* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

using Doubles = __m512d;
TDM_FAST_INLINE Doubles low_doubles(Vec v) { return _mm512_cvtps_pd(_mm512_castps512_ps256(v)); }
TDM_FAST_INLINE Doubles high_doubles(Vec v) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)); }

#elif defined(__AVX2__)

using Vec = __m256;
constexpr int64_t width = 8;

TDM_FAST_INLINE Vec broadcast(float value) { return _mm256_set1_ps(value); }

TDM_FAST_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
TDM_FAST_INLINE Vec load(const BFloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
TDM_FAST_INLINE Vec load(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

TDM_FAST_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
TDM_FAST_INLINE void store(BFloat16* p, Vec v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i result = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(result, result), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
TDM_FAST_INLINE void store(Half* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

using Doubles = __m256d;
TDM_FAST_INLINE Doubles low_doubles(Vec v) { return _mm256_cvtps_pd(_mm256_castps256_ps128(v)); }
TDM_FAST_INLINE Doubles high_doubles(Vec v) { return _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)); }

#else

using Vec = float;
constexpr int64_t width = 1;

TDM_FAST_INLINE Vec broadcast(float value) { return value; }

TDM_FAST_INLINE Vec load(const float* p) { return *p; }
TDM_FAST_INLINE Vec load(const BFloat16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}
TDM_FAST_INLINE Vec load(const Half* p) { return torch::headeronly::detail::fp16_ieee_to_fp32_value(p->bits); }

TDM_FAST_INLINE void store(float* p, Vec v) { *p = v; }
TDM_FAST_INLINE void store(BFloat16* p, Vec v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  p->bits = static_cast<uint16_t>(v != v ? 0x7fc0 : rounded);
}
TDM_FAST_INLINE void store(Half* p, Vec v) { p->bits = torch::headeronly::detail::fp16_ieee_from_fp32_value(v); }

using Doubles = double;
TDM_FAST_INLINE Doubles low_doubles(Vec v) { return v; }
TDM_FAST_INLINE Doubles high_doubles(Vec) { return 0.0; }

#endif

// The last n < width elements: through a padded buffer, so that they are converted exactly as all others are.
template <class T>
TDM_FAST_INLINE Vec load_tail(const T* p, int64_t n) {
  T buffer[width] = {};
  __builtin_memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}

template <class T>
TDM_FAST_INLINE void store_tail(T* p, Vec v, int64_t n) {
  T buffer[width];
  store(buffer, v);
  __builtin_memcpy(p, buffer, n * sizeof(T));
}

// Element i, or the register that begins there.
template <class V>
TDM_FAST_INLINE V at(const float* p, int64_t i) {
  if constexpr (sizeof(V) == sizeof(float)) {
    return p[i];
  } else {
    return load(p + i);
  }
}

// A sum in double of registers full of floats. Add short float sums to it: a handful of numbers each.
class Sum {
 public:
  TDM_FAST_MEMBER void add(Vec v) {
    low_ += low_doubles(v);
    high_ += high_doubles(v);
  }

  TDM_FAST_MEMBER void add_one(float v) { rest_ += static_cast<double>(v); }

  TDM_FAST_MEMBER double total() const {
    const Doubles both = low_ + high_;
    double lanes[sizeof(Doubles) / sizeof(double)], total = 0.0;
    __builtin_memcpy(lanes, &both, sizeof(both));
    for (double lane : lanes) total += lane;
    return total + rest_;
  }

 private:
  Doubles low_ = {}, high_ = {};
  double rest_ = 0.0;
};

// Registers of floats that are added up before they go into a Sum. A register of one float would make that one sum of 8.
constexpr int64_t run_length = width == 1 ? 1 : 8;

}  // namespace TDM_FAST_ISA
}  // namespace tdm_fast
