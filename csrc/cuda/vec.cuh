// Latents of each dtype to and from float in CUDA threads, one by one or in 8s with 16-byte accesses.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../dtypes.h"
#include "../maths.h"

namespace tdm_fast {
namespace cuda {

constexpr int elements_per_thread = 8;

TDM_FAST_INLINE float to_float(float value) { return value; }
TDM_FAST_INLINE float to_float(BFloat16 value) { return __bfloat162float(__ushort_as_bfloat16(value.bits)); }
TDM_FAST_INLINE float to_float(Half value) { return __half2float(__ushort_as_half(value.bits)); }

TDM_FAST_INLINE void from_float(float value, float& result) { result = value; }
TDM_FAST_INLINE void from_float(float value, BFloat16& result) {
  result.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
TDM_FAST_INLINE void from_float(float value, Half& result) { result.bits = __half_as_ushort(__float2half_rn(value)); }

// 8 elements that start at a 16-byte boundary, moved as whole 16-byte words.
template <class T>
struct alignas(16) Pack {
  T values[elements_per_thread];
};

template <class T>
TDM_FAST_INLINE Pack<T> load_pack(const T* p) {
  Pack<T> pack;
  constexpr int words = sizeof(Pack<T>) / sizeof(uint4);
#pragma unroll
  for (int i = 0; i < words; ++i) reinterpret_cast<uint4*>(&pack)[i] = reinterpret_cast<const uint4*>(p)[i];
  return pack;
}

template <class T>
TDM_FAST_INLINE void store_pack(T* p, const Pack<T>& pack) {
  constexpr int words = sizeof(Pack<T>) / sizeof(uint4);
#pragma unroll
  for (int i = 0; i < words; ++i) reinterpret_cast<uint4*>(p)[i] = reinterpret_cast<const uint4*>(&pack)[i];
}

}  // namespace cuda
}  // namespace tdm_fast
