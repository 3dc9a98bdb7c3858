// Which of the compiled instruction sets this processor runs.
#pragma once

#include <cstdlib>
#include <cstring>

// Every file in cpu/ is compiled once per instruction set, into a namespace of its own, and chosen when called. The
// wheel therefore runs on any x86-64. Elsewhere the compiler's default target is the only one.
#if defined(__x86_64__)
#define TDM_FAST_DECLARE_FOR_EACH_ISA(declaration) \
  namespace isa_default {                          \
  declaration;                                     \
  }                                                \
  namespace isa_avx2 {                             \
  declaration;                                     \
  }                                                \
  namespace isa_avx512 {                           \
  declaration;                                     \
  }
#define TDM_FAST_SELECT_ISA(function)                                                         \
  (::tdm_fast::instruction_set() == ::tdm_fast::InstructionSet::avx512 ? isa_avx512::function \
   : ::tdm_fast::instruction_set() == ::tdm_fast::InstructionSet::avx2 ? isa_avx2::function   \
                                                                       : isa_default::function)
#else
#define TDM_FAST_DECLARE_FOR_EACH_ISA(declaration) \
  namespace isa_default {                          \
  declaration;                                     \
  }
#define TDM_FAST_SELECT_ISA(function) isa_default::function
#endif

namespace tdm_fast {

enum class InstructionSet { baseline, avx2, avx512 };

inline InstructionSet detect_instruction_set() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  // torch's own variable, so that one setting holds back torch's kernels and these alike.
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  if (limit != nullptr && std::strcmp(limit, "default") == 0) return InstructionSet::baseline;
  if (avx512 && !(limit != nullptr && std::strcmp(limit, "avx2") == 0)) return InstructionSet::avx512;
  if (avx2) return InstructionSet::avx2;
#endif
  return InstructionSet::baseline;
}

inline InstructionSet instruction_set() {
  static const InstructionSet detected = detect_instruction_set();
  return detected;
}

}  // namespace tdm_fast
