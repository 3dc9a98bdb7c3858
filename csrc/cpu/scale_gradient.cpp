// scale_gradient on the CPU, for the chunks [begin, end) of the batch. Compiled once per instruction set.
#include "../scale_gradient.h"

#include "blocks.h"

namespace tdm_fast {
namespace TDM_FAST_ISA {

static void scale_block(const float* residual, float* gradient, int64_t n, float scale, float grad_output) {
  const Vec scales = broadcast(scale), grad_outputs = broadcast(grad_output);
  int64_t i = 0;
  for (; i + width <= n; i += width) {
    store(gradient + i, tdm_fast::scale_gradient<Vec>(load(residual + i), scales, grad_outputs));
  }
  for (; i < n; ++i) gradient[i] = tdm_fast::scale_gradient<float>(residual[i], scale, grad_output);
}

static void scale_block(const float* residual, const float* grad_output, float* gradient, int64_t n, float scale) {
  const Vec scales = broadcast(scale);
  int64_t i = 0;
  for (; i + width <= n; i += width) {
    store(gradient + i, tdm_fast::scale_gradient<Vec>(load(residual + i), scales, load(grad_output + i)));
  }
  for (; i < n; ++i) gradient[i] = tdm_fast::scale_gradient<float>(residual[i], scale, grad_output[i]);
}

void scale_gradient(const ScaleGradientArgs& args, int64_t begin, int64_t end) {
  Reader residual(args.residual), grad_output(args.grad_output);
  Writer gradient(args.gradient, args.shape.per_sample);
  // Most often one number for all, float32 as every upstream gradient is.
  const bool per_element = args.grad_output.element_stride != 0;
  const float* numbers = static_cast<const float*>(args.grad_output.data);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    for_each_block(args.shape, chunk, [&](const Block& block) {
      const float scale = args.scale[block.b];
      if (per_element) {
        scale_block(residual.read(block), grad_output.read(block), gradient.floats(block), block.size, scale);
      } else {
        const float number = numbers[block.b * args.grad_output.batch_stride];
        scale_block(residual.read(block), gradient.floats(block), block.size, scale, number);
      }
      gradient.write(block);
    });
  }
}

}  // namespace TDM_FAST_ISA
}  // namespace tdm_fast
