// Sums without atomics, the same bits on every run: each thread adds pairs in float, then in double; each block
// writes the sums of its chunk into slots; a second kernel of one block adds the slots in an order that the shape alone
// decides.
#pragma once

#include "launch.cuh"

namespace tdm_fast {
namespace cuda {

constexpr int warp = 32;

// The sum over the warp, in every lane.
TDM_FAST_INLINE double warp_sum(double value) {
#pragma unroll
  for (int mask = warp / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
  return value;
}

// Writes the block's sums of `values` to slots[0 .. sums). All threads of the block must call it.
template <int sums>
TDM_FAST_INLINE void write_block_sums(const double (&values)[sums], double* slots) {
  __shared__ double partial[threads / warp][sums];
#pragma unroll
  for (int s = 0; s < sums; ++s) {
    const double sum = warp_sum(values[s]);
    if (threadIdx.x % warp == 0) partial[threadIdx.x / warp][s] = sum;
  }
  __syncthreads();
  if (threadIdx.x < sums) {
    double sum = 0;
#pragma unroll
    for (int w = 0; w < threads / warp; ++w) sum += partial[w][threadIdx.x];
    slots[threadIdx.x] = sum;
  }
}

// Adds up to 8 floats, those from `count` on not, to `sum`: pairs in float, which halves the double additions that are
// scarce on consumer GPUs, and rounds a sum of few elements hardly more than double would.
TDM_FAST_INLINE void add_to(double& sum, const float (&values)[pack], int count) {
#pragma unroll
  for (int j = 0; j < pack; j += 2) {
    sum += static_cast<double>((j < count ? values[j] : 0.0f) + (j + 1 < count ? values[j + 1] : 0.0f));
  }
}

constexpr int finish_threads = 1024;

// The second pass. Finish has per_sample(b, sums), called by one thread per sample, which returns the sample's part of a
// total, and total(value), called once. Of the block's 32 warps `warps_per_sample` work on one sample at a time.
template <int sums, class Finish>
__global__ void __launch_bounds__(finish_threads)
    finish_kernel(const double* slots, int64_t batch, int64_t chunks, int warps_per_sample, Finish finish) {
  constexpr int warps = finish_threads / warp;
  __shared__ double partial[warps][sums];
  const int thread = static_cast<int>(threadIdx.x), groups = warps / warps_per_sample;
  const int group = thread / (warp * warps_per_sample), within = thread % (warp * warps_per_sample);
  double total = 0;
  for (int64_t first = 0; first < batch; first += groups) {
    const int64_t b = first + group;
    double values[sums] = {};
    if (b < batch) {
      for (int64_t chunk = within; chunk < chunks; chunk += warp * warps_per_sample) {
#pragma unroll
        for (int s = 0; s < sums; ++s) values[s] += slots[(b * chunks + chunk) * sums + s];
      }
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < sums; ++s) {
      const double sum = warp_sum(values[s]);
      if (thread % warp == 0) partial[thread / warp][s] = sum;
    }
    __syncthreads();
    if (b < batch && within == 0) {
      double whole[sums] = {};
      for (int w = 0; w < warps_per_sample; ++w) {
#pragma unroll
        for (int s = 0; s < sums; ++s) whole[s] += partial[group * warps_per_sample + w][s];
      }
      total += finish.per_sample(b, whole);
    }
  }
  __syncthreads();
  if (within == 0) partial[group][0] = total;
  __syncthreads();
  if (thread == 0) {
    double whole = 0;
    for (int g = 0; g < groups; ++g) whole += partial[g][0];
    finish.total(whole);
  }
}

template <int sums, class Finish>
const char* start_finish(const double* slots, Shape shape, const Finish& finish, void* stream) {
  int warps_per_sample = 1;
  while (2 * warps_per_sample * shape.batch <= finish_threads / warp) warps_per_sample *= 2;
  const int64_t chunks = chunks_per_sample(shape.per_sample);
  return start(finish_kernel<sums, Finish>, 1, finish_threads, stream, slots, shape.batch, chunks, warps_per_sample, finish);
}

}  // namespace cuda
}  // namespace tdm_fast
