// float16 as CUDA's header names it.
#pragma once

#include <torch/headeronly/util/Half.h>

struct __half {
  uint16_t bits;
};

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half value) { return value.bits; }
inline float __half2float(__half value) { return torch::headeronly::detail::fp16_ieee_to_fp32_value(value.bits); }
inline __half __float2half_rn(float value) { return {torch::headeronly::detail::fp16_ieee_from_fp32_value(value)}; }
