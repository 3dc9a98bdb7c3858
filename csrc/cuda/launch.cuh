// How an op's kernel is chosen by the dtypes of its latents, cut into blocks, and started.
#pragma once

#include <cuda_runtime.h>

#include <initializer_list>

#include "latents.cuh"

namespace tdm_fast {
namespace cuda {

constexpr int threads = 256;
constexpr int64_t tile = threads * pack;
static_assert(chunk_elements % tile == 0, "a chunk is a whole number of tiles");

// Returns null, or what is wrong.
template <class... Parameters, class... Arguments>
const char* start(void (*kernel)(Parameters...), int64_t blocks, int block_threads, void* stream,
                  const Arguments&... arguments) {
  if (blocks > INT32_MAX) return "more than 2^31 - 1 blocks";
  cudaLaunchConfig_t config = {};
  config.gridDim.x = static_cast<unsigned>(blocks);
  config.blockDim.x = static_cast<unsigned>(block_threads);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Whether every thread's elements of the latent are a whole pack at a 16-byte boundary.
inline bool is_regular(const Latent& latent, Shape shape) {
  const int64_t bytes = latent.dtype == DType::float32 ? 4 : 2;
  return latent.element_stride == 1 && shape.per_sample % pack == 0 &&
         reinterpret_cast<uintptr_t>(latent.data) % 16 == 0 &&
         (shape.batch == 1 || latent.batch_stride * bytes % 16 == 0);
}

// Calls run(T{}) with T the latents' dtype, or with Mixed where they differ or are not regular.
template <class Run>
const char* by_dtype(std::initializer_list<Latent> latents, Shape shape, const Run& run) {
  const DType dtype = latents.begin()->dtype;
  for (const Latent& latent : latents) {
    if (latent.dtype != dtype || !is_regular(latent, shape)) return run(Mixed{});
  }
  switch (dtype) {
    case DType::float32:
      return run(0.0f);
    case DType::bfloat16:
      return run(BFloat16{});
    case DType::float16:
      return run(Half{});
  }
  return "unknown dtype";
}

// Kernels without sums run one block per tile of one sample, kernels with sums one per chunk.
inline int64_t tiles_per_sample(Shape shape) { return (shape.per_sample + tile - 1) / tile; }

// The elements of this thread in the tile that begins at `begin`; count is 0 past the sample's end.
TDM_FAST_INLINE Span span_at(Shape shape, int64_t sample, int64_t begin) {
  const int64_t first = begin + threadIdx.x * pack;
  const int64_t left = shape.per_sample - first;
  return {sample, first, static_cast<int>(left >= pack ? pack : left > 0 ? left : 0)};
}

// Which sample this block works on, and which of the sample's `parts`.
struct Place {
  int64_t sample, part;
};

TDM_FAST_INLINE Place place_of_block(int64_t parts) {
  // Both fit 31 bits, since the grid does; 64-bit division is slow on a GPU.
  const uint32_t sample = blockIdx.x / static_cast<uint32_t>(parts);
  return {sample, blockIdx.x - sample * static_cast<uint32_t>(parts)};
}

}  // namespace cuda
}  // namespace tdm_fast
