// ode_step on the CPU, for the chunks [begin, end) of the batch. Compiled once per instruction set.
#include "../ode_step.h"

#include "blocks.h"

namespace tdm_fast {
namespace TDM_FAST_ISA {

static void step_block(const float* sample, const float* model_output, float* next, int64_t n, StepScale scale) {
  const Vec sample_scale = broadcast(scale.sample), output_scale = broadcast(scale.output);
  int64_t i = 0;
  for (; i + width <= n; i += width) {
    store(next + i, tdm_fast::ode_step<Vec>(load(sample + i), load(model_output + i), sample_scale, output_scale));
  }
  for (; i < n; ++i) next[i] = tdm_fast::ode_step<float>(sample[i], model_output[i], scale.sample, scale.output);
}

void ode_step(const OdeStepArgs& args, int64_t begin, int64_t end) {
  Reader sample(args.sample), model_output(args.model_output);
  Writer next(args.next, args.shape.per_sample);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    for_each_block(args.shape, chunk, [&](const Block& block) {
      const StepScale scale = step_scale(args.tables, args.t[block.b], args.t_next[block.b]);
      step_block(sample.read(block), model_output.read(block), next.floats(block), block.size, scale);
      next.write(block);
    });
  }
}

static void scale_block(const float* gradient, float* scaled, int64_t n, float scale) {
  const Vec scales = broadcast(scale);
  int64_t i = 0;
  for (; i + width <= n; i += width) store(scaled + i, load(gradient + i) * scales);
  for (; i < n; ++i) scaled[i] = gradient[i] * scale;
}

void ode_step_backward(const OdeStepBackwardArgs& args, int64_t begin, int64_t end) {
  Reader gradient(args.gradient);
  Writer to_sample(args.to_sample, args.shape.per_sample), to_output(args.to_model_output, args.shape.per_sample);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    for_each_block(args.shape, chunk, [&](const Block& block) {
      const StepScale scale = step_scale(args.tables, args.t[block.b], args.t_next[block.b]);
      const float* floats = gradient.read(block);
      if (args.to_sample.data != nullptr) {
        scale_block(floats, to_sample.floats(block), block.size, scale.sample);
        to_sample.write(block);
      }
      if (args.to_model_output.data != nullptr) {
        scale_block(floats, to_output.floats(block), block.size, scale.output);
        to_output.write(block);
      }
    });
  }
}

}  // namespace TDM_FAST_ISA
}  // namespace tdm_fast
