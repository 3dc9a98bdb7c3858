// Checks and accessors on stable-ABI tensors, for the ops' bindings.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "dtypes.h"

namespace tdm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType latent_dtype(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
      return DType::float32;
  }
}

inline void check_contiguous(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

// A contiguous 1-D tensor of `length` elements on `like`'s device, as a pointer.
template <class T>
const T* vector_data(const Tensor& tensor, ScalarType dtype, int64_t length, const Tensor& like, const char* name) {
  check_contiguous(tensor, name);
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == length, name, " must have shape [", length, "]");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.device() == like.device(), name, " must be on the latents' device");
  return static_cast<const T*>(tensor.const_data_ptr());
}

}  // namespace tdm_fast
