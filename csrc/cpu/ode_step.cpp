// ode_step on the CPU, for the elements [begin, end) of the flattened batch. Compiled once per instruction set.
#include "../ode_step.h"

#include "vec.h"

namespace tdm_fast {
namespace TDM_FAST_ISA {

template <class S, class O>
static void step_elements(const S* sample, const O* model_output, S* next, int64_t n, StepScale scale) {
  const Vec sample_scale = broadcast(scale.sample), output_scale = broadcast(scale.output);
  int64_t i = 0;
  for (; i + width <= n; i += width) {
    store(next + i, tdm_fast::ode_step<Vec>(load(sample + i), load(model_output + i), sample_scale, output_scale));
  }
  if (i < n) {
    const Vec x = load_tail(sample + i, n - i), out = load_tail(model_output + i, n - i);
    store_tail(next + i, tdm_fast::ode_step<Vec>(x, out, sample_scale, output_scale), n - i);
  }
}

template <class S, class O>
static void step_range(const OdeStepArgs& args, int64_t begin, int64_t end) {
  const S* sample = static_cast<const S*>(args.sample);
  const O* model_output = static_cast<const O*>(args.model_output);
  S* next = static_cast<S*>(args.next);
  while (begin < end) {
    const int64_t b = begin / args.per_sample;
    const int64_t sample_end = (b + 1) * args.per_sample;
    const int64_t stop = sample_end < end ? sample_end : end;
    const StepScale scale = step_scale(args.tables, args.t[b], args.t_next[b]);
    step_elements(sample + begin, model_output + begin, next + begin, stop - begin, scale);
    begin = stop;
  }
}

template <class S>
static void step_range_of(const OdeStepArgs& args, int64_t begin, int64_t end) {
  switch (args.output_dtype) {
    case DType::float32:
      return step_range<S, float>(args, begin, end);
    case DType::bfloat16:
      return step_range<S, BFloat16>(args, begin, end);
    case DType::float16:
      return step_range<S, Half>(args, begin, end);
  }
}

void ode_step(const OdeStepArgs& args, int64_t begin, int64_t end) {
  switch (args.sample_dtype) {
    case DType::float32:
      return step_range_of<float>(args, begin, end);
    case DType::bfloat16:
      return step_range_of<BFloat16>(args, begin, end);
    case DType::float16:
      return step_range_of<Half>(args, begin, end);
  }
}

}  // namespace TDM_FAST_ISA
}  // namespace tdm_fast
