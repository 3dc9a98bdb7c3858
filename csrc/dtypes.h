// Storage types of latents. Plain structs of bits: how they become float is each kernel's business.
#pragma once

#include <cstdint>

namespace tdm_fast {

enum class DType : int { float32, bfloat16, float16 };

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

}  // namespace tdm_fast
