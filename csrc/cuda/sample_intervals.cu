// sample_intervals on the GPU: one thread per sample.
#include "../sample_intervals.h"

#include "launch.cuh"

namespace tdm_fast {
namespace cuda {

__global__ void __launch_bounds__(threads) sample_intervals_kernel(const __grid_constant__ SampleIntervalsArgs args) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (index < args.batch) sample_interval(args, index);
}

const char* sample_intervals(const SampleIntervalsArgs& args, void* stream) {
  return start(sample_intervals_kernel, (args.batch + threads - 1) / threads, threads, stream, args);
}

}  // namespace cuda
}  // namespace tdm_fast
