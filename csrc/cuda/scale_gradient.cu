// scale_gradient on the GPU: the backward of every loss.
#include "../scale_gradient.h"

#include "launch.cuh"

namespace tdm_fast {
namespace cuda {

template <class T>
__global__ void __launch_bounds__(threads)
    scale_gradient_kernel(const __grid_constant__ ScaleGradientArgs args, int64_t tiles) {
  const Place place = place_of_block(tiles);
  const int64_t b = place.sample;
  const Span span = span_at(args.shape, b, place.part * tile);
  if (span.count == 0) return;
  const Loaded<T> residual = load<T>(args.residual, span);
  const float scale = args.scale[b];
  float gradient[pack];
  if (args.grad_output.element_stride == 0) {
    const float grad_output = static_cast<const float*>(args.grad_output.data)[b * args.grad_output.batch_stride];
#pragma unroll
    for (int j = 0; j < pack; ++j) gradient[j] = scale_gradient(element(residual, j), scale, grad_output);
  } else {
    const Loaded<Mixed> grad_output = load<Mixed>(args.grad_output, span);
#pragma unroll
    for (int j = 0; j < pack; ++j) {
      gradient[j] = scale_gradient(element(residual, j), scale, element(grad_output, j));
    }
  }
  store(args.gradient, args.shape.per_sample, span, gradient);
}

const char* scale_gradient(const ScaleGradientArgs& args, void* stream) {
  const int64_t tiles = tiles_per_sample(args.shape);
  return by_dtype({args.residual}, args.shape, [&](auto tag) {
    return start(scale_gradient_kernel<decltype(tag)>, args.shape.batch * tiles, threads, stream, args, tiles);
  });
}

}  // namespace cuda
}  // namespace tdm_fast
