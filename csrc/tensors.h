// Checks and accessors on stable-ABI tensors, for the ops' bindings.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <limits>
#include <optional>
#include <vector>

#include "latent.h"
#include "random.h"

namespace tdm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType latent_dtype(ScalarType dtype, const char* name) {
  switch (dtype) {
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

inline Shape latent_shape(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() >= 1, name, " must have a batch dimension");
  const int64_t batch = tensor.size(0);
  return {batch, batch == 0 ? 0 : tensor.numel() / batch};
}

// A tensor [B, ...] of `like`'s shape and device whose samples are contiguous or one repeated element each;
// tdm_fast/ops/_rows.py brings tensors into this form.
inline Latent latent(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(tensor.sizes().equals(like.sizes()), name, " has the wrong shape");
  STD_TORCH_CHECK(tensor.device() == like.device(), name, " must be on the other latents' device");
  int64_t dense = 1;
  bool contiguous = true, repeated = true;
  for (int64_t d = tensor.dim() - 1; d > 0; --d) {
    if (tensor.size(d) == 1) continue;
    contiguous = contiguous && tensor.stride(d) == dense;
    repeated = repeated && tensor.stride(d) == 0;
    dense *= tensor.size(d);
  }
  STD_TORCH_CHECK(contiguous || repeated || tensor.numel() == 0, name,
                  " must have samples that are contiguous or one repeated element");
  return {tensor.const_data_ptr(), tensor.stride(0), contiguous ? 1 : 0, latent_dtype(tensor.scalar_type(), name)};
}

inline Tensor new_latents(const Tensor& like, ScalarType dtype) {
  return torch::stable::new_empty(like, like.sizes(), dtype);
}

inline Output output(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), latent_dtype(tensor.scalar_type(), "an output")};
}

// For a few numbers per sample, which every kernel fills: without the dispatcher, and a third of new_empty's time.
inline Tensor new_small(const Tensor& like, int64_t dim, int64_t length, ScalarType dtype) {
  int32_t device_type, device_index;
  const int64_t stride = 1;
  const int32_t raw_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, &length, &stride, raw_dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

template <ScalarType dtype = ScalarType::Float>
Tensor new_vector(const Tensor& like, int64_t length) {
  return new_small(like, 1, length, dtype);
}

inline Tensor new_scalar(const Tensor& like) { return new_small(like, 0, 1, ScalarType::Float); }

inline Tensor new_slots(const Tensor& like, Shape shape, int64_t sums_per_chunk) {
  return new_vector<ScalarType::Double>(like, slot_count(shape, sums_per_chunk));
}

// The gradient per element that a loss keeps for its backward: in `dtype`, except that an unbounded one would overflow
// in float16. No element where it is not wanted.
inline Tensor new_residual(const Tensor& like, ScalarType dtype, bool bounded, bool wanted) {
  if (!wanted) return new_vector(like, 0);
  return new_latents(like, !bounded && dtype == ScalarType::Half ? ScalarType::Float : dtype);
}

inline Output residual_output(const Tensor& residual, bool wanted) {
  return wanted ? output(residual) : Output{nullptr, DType::float32};
}

constexpr double nan_value = std::numeric_limits<double>::quiet_NaN();

// A contiguous 1-D tensor of `length` elements on `like`'s device, as a pointer.
template <class T>
const T* vector_data(const Tensor& tensor, ScalarType dtype, int64_t length, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == length, name, " must have shape [", length, "]");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.device() == like.device(), name, " must be on the latents' device");
  return static_cast<const T*>(tensor.const_data_ptr());
}

inline const float* floats(const Tensor& tensor, int64_t length, const Tensor& like, const char* name) {
  return vector_data<float>(tensor, ScalarType::Float, length, like, name);
}

inline const float* floats_or_null(const OptionalTensor& tensor, int64_t length, const Tensor& like, const char* name) {
  return tensor.has_value() ? floats(*tensor, length, like, name) : nullptr;
}

inline const int64_t* timesteps(const Tensor& tensor, int64_t length, const Tensor& like, const char* name) {
  return vector_data<int64_t>(tensor, ScalarType::Long, length, like, name);
}

inline Tables make_tables(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& d, const Tensor& alpha,
                          const Tensor& sigma, const Tensor& like) {
  const int64_t n = a.numel();
  return {floats(a, n, like, "a"),
          floats(b, n, like, "b"),
          floats(c, n, like, "c"),
          floats(d, n, like, "d"),
          floats(alpha, n, like, "alpha"),
          floats(sigma, n, like, "sigma"),
          n};
}

// A 0-d int64 tensor on `like`'s device, or null: then the number beside it counts.
inline const int64_t* number_or_null(const OptionalTensor& tensor, const Tensor& like, const char* name) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(tensor->dim() == 0 && tensor->scalar_type() == ScalarType::Long, name, " must be a 0-d int64 tensor");
  STD_TORCH_CHECK(tensor->device() == like.device(), name, " must be on the device of the result");
  return static_cast<const int64_t*>(tensor->const_data_ptr());
}

inline Draw make_draw(const OptionalTensor& seed_tensor, const OptionalTensor& iteration_tensor, int64_t seed,
                      int64_t iteration, int64_t stream, int64_t sample_offset, uint32_t purpose, const Tensor& like) {
  return {number_or_null(seed_tensor, like, "seed"),
          number_or_null(iteration_tensor, like, "iteration"),
          seed,
          iteration,
          sample_offset,
          static_cast<uint32_t>(stream),
          purpose};
}

}  // namespace tdm_fast
