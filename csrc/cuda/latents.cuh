// How a CUDA thread reads and writes its elements of latents: up to 8 consecutive ones of one sample, with 16-byte
// accesses where the sample starts at a 16-byte boundary.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "../latent.h"
#include "../maths.h"

namespace tdm_fast {
namespace cuda {

constexpr int pack = 8;

// The elements [begin, begin + count) of sample `sample`; begin is a multiple of 8, count is 1 to 8.
struct Span {
  int64_t sample, begin;
  int count;
};

TDM_FAST_INLINE float to_float(float value) { return value; }
TDM_FAST_INLINE float to_float(BFloat16 value) { return __bfloat162float(__ushort_as_bfloat16(value.bits)); }
TDM_FAST_INLINE float to_float(Half value) { return __half2float(__ushort_as_half(value.bits)); }

TDM_FAST_INLINE void from_float(float value, float& result) { result = value; }
TDM_FAST_INLINE void from_float(float value, BFloat16& result) {
  result.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
TDM_FAST_INLINE void from_float(float value, Half& result) { result.bits = __half_as_ushort(__float2half_rn(value)); }

TDM_FAST_INLINE bool on_16_bytes(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// The 8 elements of a thread as they lie in memory; the loads of all of an op's latents are under way before the first
// is converted.
template <class T>
struct alignas(16) Loaded {
  T values[pack];
};

// What stands in T's place where an op's latents differ in dtype or do not consist of whole packs: the dtype is looked
// at when the kernel runs. One such kernel per op instead of one per combination of dtypes.
struct Mixed {};

template <>
struct alignas(16) Loaded<Mixed> {
  uint32_t words[pack];
  DType dtype;
};

template <class T>
TDM_FAST_INLINE Loaded<T> load_regular(const Latent& latent, const Span& span) {
  const T* p = static_cast<const T*>(latent.data) + span.sample * latent.batch_stride + span.begin;
  Loaded<T> loaded;
#pragma unroll
  for (unsigned i = 0; i < sizeof(loaded) / sizeof(uint4); ++i) {
    reinterpret_cast<uint4*>(&loaded)[i] = reinterpret_cast<const uint4*>(p)[i];
  }
  return loaded;
}

TDM_FAST_INLINE Loaded<Mixed> load_mixed(const Latent& latent, const Span& span) {
  Loaded<Mixed> loaded;
  loaded.dtype = latent.dtype;
  const bool is_float = latent.dtype == DType::float32;
  const int64_t first = span.sample * latent.batch_stride + span.begin * latent.element_stride;
  const char* p = static_cast<const char*>(latent.data) + first * (is_float ? 4 : 2);
  if (span.count == pack && latent.element_stride == 1 && on_16_bytes(p)) {
    const uint4* packs = reinterpret_cast<const uint4*>(p);
    reinterpret_cast<uint4*>(loaded.words)[0] = packs[0];
    if (is_float) reinterpret_cast<uint4*>(loaded.words)[1] = packs[1];
  } else if (is_float) {
#pragma unroll
    for (int j = 0; j < pack; ++j) {
      loaded.words[j] = j < span.count ? reinterpret_cast<const uint32_t*>(p)[j * latent.element_stride] : 0;
    }
  } else {
#pragma unroll
    for (int j = 0; j < pack; j += 2) {
      const uint16_t* halves = reinterpret_cast<const uint16_t*>(p);
      const uint32_t low = j < span.count ? halves[j * latent.element_stride] : 0;
      const uint32_t high = j + 1 < span.count ? halves[(j + 1) * latent.element_stride] : 0;
      loaded.words[j / 2] = low | high << 16;
    }
  }
  return loaded;
}

// T other than Mixed: of a latent that has dtype T and is regular (`is_regular` in launch.cuh).
template <class T>
TDM_FAST_INLINE Loaded<T> load(const Latent& latent, const Span& span) {
  if constexpr (std::is_same_v<T, Mixed>) {
    return load_mixed(latent, span);
  } else {
    return load_regular<T>(latent, span);
  }
}

// Element j, 0 from `count` on where the kernel is the mixed one.
template <class T>
TDM_FAST_INLINE float element(const Loaded<T>& loaded, int j) {
  return to_float(loaded.values[j]);
}

TDM_FAST_INLINE float element(const Loaded<Mixed>& loaded, int j) {
  if (loaded.dtype == DType::float32) return float_from_bits(loaded.words[j]);
  const uint16_t bits = static_cast<uint16_t>(loaded.words[j / 2] >> (16 * (j % 2)));
  return loaded.dtype == DType::bfloat16 ? to_float(BFloat16{bits}) : to_float(Half{bits});
}

// Elements 2i and 2i + 1 of 16 bits as they lie in one word of memory.
template <class T>
TDM_FAST_INLINE uint32_t word_of(const T& low, const T& high) {
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
}

// Streaming stores keep the inputs in the cache, and cannot be taken apart: nvcc 13 splits an assignment of 16 bytes in two to four
// when the same elements are stored one by one in another branch.
TDM_FAST_INLINE void store_pack(float* p, const float (&v)[pack]) {
  uint4* packs = reinterpret_cast<uint4*>(p);
  __stcs(packs, {float_bits(v[0]), float_bits(v[1]), float_bits(v[2]), float_bits(v[3])});
  __stcs(packs + 1, {float_bits(v[4]), float_bits(v[5]), float_bits(v[6]), float_bits(v[7])});
}

template <class T>
TDM_FAST_INLINE void store_pack(T* p, const T (&v)[pack]) {
  __stcs(reinterpret_cast<uint4*>(p),
         {word_of(v[0], v[1]), word_of(v[2], v[3]), word_of(v[4], v[5]), word_of(v[6], v[7])});
}

template <class T>
TDM_FAST_INLINE void store_as(T* p, int count, const float (&values)[pack]) {
  T converted[pack];
#pragma unroll
  for (int j = 0; j < pack; ++j) from_float(values[j], converted[j]);
  if (count == pack && on_16_bytes(p)) {
    store_pack(p, converted);
  } else {
#pragma unroll
    for (int j = 0; j < pack; ++j) {
      if (j < count) p[j] = converted[j];
    }
  }
}

TDM_FAST_INLINE void store(const Output& output, int64_t per_sample, const Span& span, const float (&values)[pack]) {
  const int64_t first = span.sample * per_sample + span.begin;
  if (output.dtype == DType::float32) {
    store_as(static_cast<float*>(output.data) + first, span.count, values);
  } else if (output.dtype == DType::bfloat16) {
    store_as(static_cast<BFloat16*>(output.data) + first, span.count, values);
  } else {
    store_as(static_cast<Half*>(output.data) + first, span.count, values);
  }
}

}  // namespace cuda
}  // namespace tdm_fast
