// ode_step on the GPU. No torch header in here: nvcc needs seconds per architecture for those, and the kernel none of
// them.
#include "../ode_step.h"

#include <cuda_runtime.h>

#include "vec.cuh"

namespace tdm_fast {
namespace cuda {

constexpr int threads = 256;
constexpr int64_t block_elements = threads * elements_per_thread;

// One block per chunk of 2048 elements of one sample; the grid depends on the shape alone. `aligned`: every chunk
// starts at a 16-byte boundary and has whole packs of 8.
template <class S, class O, bool aligned>
__global__ void __launch_bounds__(threads) ode_step_kernel(OdeStepArgs args, int64_t chunks) {
  const int64_t b = blockIdx.x / chunks;
  const int64_t begin = (blockIdx.x - b * chunks) * block_elements;
  const StepScale scale = step_scale(args.tables, args.t[b], args.t_next[b]);
  const S* sample = static_cast<const S*>(args.sample) + b * args.per_sample;
  const O* model_output = static_cast<const O*>(args.model_output) + b * args.per_sample;
  S* next = static_cast<S*>(args.next) + b * args.per_sample;
  if constexpr (aligned) {
    const int64_t i = begin + threadIdx.x * elements_per_thread;
    if (i >= args.per_sample) return;
    const Pack<S> x = load_pack(sample + i);
    const Pack<O> out = load_pack(model_output + i);
    Pack<S> result;
#pragma unroll
    for (int j = 0; j < elements_per_thread; ++j) {
      from_float(ode_step<float>(to_float(x.values[j]), to_float(out.values[j]), scale.sample, scale.output),
                 result.values[j]);
    }
    store_pack(next + i, result);
  } else {
#pragma unroll
    for (int j = 0; j < elements_per_thread; ++j) {
      const int64_t i = begin + j * threads + threadIdx.x;
      if (i >= args.per_sample) return;
      from_float(ode_step<float>(to_float(sample[i]), to_float(model_output[i]), scale.sample, scale.output), next[i]);
    }
  }
}

static bool on_16_bytes(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class S, class O>
static const char* launch(const OdeStepArgs& args, cudaStream_t stream) {
  const int64_t chunks = (args.per_sample + block_elements - 1) / block_elements;
  const int64_t blocks = args.batch * chunks;
  if (blocks > INT32_MAX) return "more than 2^31 blocks of 2048 elements";
  const bool aligned = args.per_sample % elements_per_thread == 0 && on_16_bytes(args.sample) &&
                       on_16_bytes(args.model_output) && on_16_bytes(args.next);
  if (aligned) {
    ode_step_kernel<S, O, true><<<static_cast<unsigned>(blocks), threads, 0, stream>>>(args, chunks);
  } else {
    ode_step_kernel<S, O, false><<<static_cast<unsigned>(blocks), threads, 0, stream>>>(args, chunks);
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class S>
static const char* launch_of(const OdeStepArgs& args, cudaStream_t stream) {
  switch (args.output_dtype) {
    case DType::float32:
      return launch<S, float>(args, stream);
    case DType::bfloat16:
      return launch<S, BFloat16>(args, stream);
    case DType::float16:
      return launch<S, Half>(args, stream);
  }
  return "unknown dtype of model_output";
}

const char* ode_step(const OdeStepArgs& args, void* stream) {
  switch (args.sample_dtype) {
    case DType::float32:
      return launch_of<float>(args, static_cast<cudaStream_t>(stream));
    case DType::bfloat16:
      return launch_of<BFloat16>(args, static_cast<cudaStream_t>(stream));
    case DType::float16:
      return launch_of<Half>(args, static_cast<cudaStream_t>(stream));
  }
  return "unknown dtype of sample";
}

}  // namespace cuda
}  // namespace tdm_fast
