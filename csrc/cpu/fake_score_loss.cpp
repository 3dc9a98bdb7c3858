// fake_score_loss and fake_score_loss_from_outputs on the CPU, for the chunks [begin, end). Compiled once per
// instruction set.
#include "../fake_score_loss.h"

#include "blocks.h"

namespace tdm_fast {
namespace TDM_FAST_ISA {

template <bool from_outputs, class V>
TDM_FAST_INLINE V error_at(const float* fake, const float* x0, const float* noisy, int64_t i, V a, V b) {
  if constexpr (from_outputs) return (a * at<V>(noisy, i) + b * at<V>(fake, i)) - at<V>(x0, i);
  return at<V>(fake, i) - at<V>(x0, i);
}

template <bool from_outputs, bool with_gradient>
static void block_sum(const float* fake, const float* x0, const float* noisy, float* residual, int64_t n, float a,
                      float b, Sum& squares) {
  const Vec wide_a = broadcast(a), wide_b = broadcast(b);
  Vec square = {};
  for_each_element(
      n,
      [&](int64_t i) {
        if (i % 16 == 0) {
          prefetch_input(fake + i);
          prefetch_input(x0 + i);
          if constexpr (from_outputs) prefetch_input(noisy + i);
        }
        const Vec error = error_at<from_outputs, Vec>(fake, x0, noisy, i, wide_a, wide_b);
        square += error * error;
        if constexpr (with_gradient) store(residual + i, error);
      },
      [&] {
        squares.add(square);
        square = Vec{};
      },
      [&](int64_t i) {
        const float error = error_at<from_outputs, float>(fake, x0, noisy, i, a, b);
        squares.add_one(error * error);
        if constexpr (with_gradient) residual[i] = error;
      });
}

template <bool from_outputs, bool with_gradient>
static void chunks(const FakeScoreLossArgs& args, int64_t begin, int64_t end) {
  Reader fake(args.fake), x0(args.x0), noisy(args.noisy);
  Writer residual(args.residual, args.shape.per_sample);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    Sum squares;
    for_each_block(args.shape, chunk, [&](const Block& block) {
      const float a = from_outputs ? table_value(args.a, args.length, args.t[block.b]) : 1.0f;
      const float b = from_outputs ? table_value(args.b, args.length, args.t[block.b]) : 1.0f;
      const float* noisy_floats = from_outputs ? noisy.read(block) : nullptr;
      float* gradient = with_gradient ? residual.floats(block) : nullptr;
      block_sum<from_outputs, with_gradient>(fake.read(block), x0.read(block), noisy_floats, gradient, block.size, a, b,
                                             squares);
      if constexpr (with_gradient) residual.write(block);
    });
    args.slots[chunk] = squares.total();
  }
}

void fake_score_loss(const FakeScoreLossArgs& args, int64_t begin, int64_t end) {
  if (args.residual.data != nullptr) {
    args.from_outputs ? chunks<true, true>(args, begin, end) : chunks<false, true>(args, begin, end);
  } else {
    args.from_outputs ? chunks<true, false>(args, begin, end) : chunks<false, false>(args, begin, end);
  }
}

}  // namespace TDM_FAST_ISA
}  // namespace tdm_fast
