// Latents as kernels see them, and how a sample is cut into chunks. Plain structs, no torch.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace tdm_fast {

// Input latents [batch, per_sample]: element i of sample b is data[b * batch_stride + i * element_stride].
// element_stride is 1, or 0 where a sample is one repeated element; batch_stride is anything, 0 and negative included.
struct Latent {
  const void* data;
  int64_t batch_stride, element_stride;
  DType dtype;
};

// Output latents, contiguous [batch, per_sample]; data is null where the output is not wanted.
struct Output {
  void* data;
  DType dtype;
};

struct Shape {
  int64_t batch, per_sample;
};

// The unit of work and of summation: chunk j of a sample covers the elements from j * chunk_elements on. It is the same
// on every device and for every number of threads, so that sums are added in the same order everywhere. A multiple of 4,
// so that no Philox block (4 elements) is split.
constexpr int64_t chunk_elements = 4096;

constexpr int64_t chunks_per_sample(int64_t per_sample) { return (per_sample + chunk_elements - 1) / chunk_elements; }

// Partial sums: slots[(b * chunks_per_sample + j) * sums_per_chunk + s] is sum s of chunk j of sample b.
constexpr int64_t slot_count(Shape shape, int64_t sums_per_chunk) {
  return shape.batch * chunks_per_sample(shape.per_sample) * sums_per_chunk;
}

}  // namespace tdm_fast
