// ode_step on the GPU. No torch header in here: nvcc needs seconds per architecture for those, and the kernel none of
// them.
#include "../ode_step.h"

#include "launch.cuh"

namespace tdm_fast {
namespace cuda {

template <class T>
__global__ void __launch_bounds__(threads) ode_step_kernel(const __grid_constant__ OdeStepArgs args, int64_t tiles) {
  const Place place = place_of_block(tiles);
  const int64_t b = place.sample;
  const Span span = span_at(args.shape, b, place.part * tile);
  if (span.count == 0) return;
  const Loaded<T> sample = load<T>(args.sample, span), model_output = load<T>(args.model_output, span);
  const StepScale scale = step_scale(args.tables, args.t[b], args.t_next[b]);
  float next[pack];
#pragma unroll
  for (int j = 0; j < pack; ++j) {
    next[j] = tdm_fast::ode_step(element(sample, j), element(model_output, j), scale.sample, scale.output);
  }
  store(args.next, args.shape.per_sample, span, next);
}

const char* ode_step(const OdeStepArgs& args, void* stream) {
  const int64_t tiles = tiles_per_sample(args.shape);
  return by_dtype({args.sample, args.model_output}, args.shape, [&](auto tag) {
    return start(ode_step_kernel<decltype(tag)>, args.shape.batch * tiles, threads, stream, args, tiles);
  });
}

}  // namespace cuda
}  // namespace tdm_fast
