// pseudo_huber on the CPU, for the chunks [begin, end) of the batch. Compiled once per instruction set.
#include "../pseudo_huber.h"

#include "blocks.h"

namespace tdm_fast {
namespace TDM_FAST_ISA {

// One block: `values` (weighted) are kept where not null, else summed (not weighted).
template <bool keep_values, bool with_gradient>
static void block_values(const float* input, const float* target, float* values, float* residual, int64_t n,
                         const PseudoHuberArgs& args, float weight, Sum& sum) {
  const Vec c = broadcast(args.c), c_squared = broadcast(args.c_squared), wide_weight = broadcast(weight);
  Vec value = {};
  for_each_element(
      n,
      [&](int64_t i) {
        if (i % 16 == 0) {
          prefetch_input(input + i);
          prefetch_input(target + i);
        }
        const LossTerm<Vec> v = penalty<true>(load(input + i) - load(target + i), c, c_squared);
        if constexpr (keep_values) {
          store(values + i, v.value * wide_weight);
        } else {
          value += v.value;
        }
        if constexpr (with_gradient) store(residual + i, v.residual);
      },
      [&] {
        sum.add(value);
        value = Vec{};
      },
      [&](int64_t i) {
        const LossTerm<float> v = penalty<true>(input[i] - target[i], args.c, args.c_squared);
        if constexpr (keep_values) {
          values[i] = v.value * weight;
        } else {
          sum.add_one(v.value);
        }
        if constexpr (with_gradient) residual[i] = v.residual;
      });
}

template <bool keep_values, bool with_gradient>
static void chunks(const PseudoHuberArgs& args, int64_t begin, int64_t end) {
  Reader input(args.input), target(args.target);
  Writer residual(args.residual, args.shape.per_sample);
  Writer values(Output{args.value, DType::float32}, args.shape.per_sample);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    Sum sum;
    for_each_block(args.shape, chunk, [&](const Block& block) {
      const float weight = args.weight != nullptr ? args.weight[block.b] : 1.0f;
      float* gradient = with_gradient ? residual.floats(block) : nullptr;
      float* value = keep_values ? values.floats(block) : nullptr;
      block_values<keep_values, with_gradient>(input.read(block), target.read(block), value, gradient, block.size, args,
                                               weight, sum);
      if constexpr (with_gradient) residual.write(block);
    });
    if constexpr (!keep_values) args.slots[chunk] = sum.total();
  }
}

void pseudo_huber(const PseudoHuberArgs& args, int64_t begin, int64_t end) {
  if (args.reduction == Reduction::none) {
    args.residual.data != nullptr ? chunks<true, true>(args, begin, end) : chunks<true, false>(args, begin, end);
  } else {
    args.residual.data != nullptr ? chunks<false, true>(args, begin, end) : chunks<false, false>(args, begin, end);
  }
}

}  // namespace TDM_FAST_ISA
}  // namespace tdm_fast
