// The optional Python module tdm_fast._build_info: what is not an op. The op libraries have no Python in them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cpu/instruction_set.h"

static const char* selected_instruction_set() {
  switch (tdm_fast::instruction_set()) {
    case tdm_fast::InstructionSet::avx512:
      return "avx512";
    case tdm_fast::InstructionSet::avx2:
      return "avx2";
    default:
      return "default";
  }
}

static std::map<std::string, std::string> build_info() {
  return {
      {"compiler", TDM_FAST_COMPILER},
      {"cxx_flags", TDM_FAST_CXX_FLAGS},
      {"instruction_sets", TDM_FAST_INSTRUCTION_SETS},
      {"instruction_set", selected_instruction_set()},
      {"cuda_compiler", TDM_FAST_CUDA_COMPILER},
      {"cuda_flags", TDM_FAST_CUDA_FLAGS},
      {"cuda_architectures", TDM_FAST_CUDA_ARCHITECTURES},
      {"torch_headers", TDM_FAST_TORCH_HEADERS},
      {"torch_target", TDM_FAST_TORCH_TARGET},
  };
}

PYBIND11_MODULE(_build_info, m) {
  m.def(
      "build_info", &build_info,
      "Compiler, flags, instruction sets compiled in and the one in use, CUDA architectures (empty where not built).");
}
