// tdm_loss and tdm_loss_from_outputs on the CPU, for the chunks [begin, end). Compiled once per instruction set.
#include "../tdm_loss.h"

#include "blocks.h"

namespace tdm_fast {
namespace TDM_FAST_ISA {

// One sample's factors; a and b are used from raw outputs only.
template <class V>
struct Factors {
  V cfg_minus_one, c, c_squared, a_gen, b_gen, a, b;
};

static Factors<Vec> broadcast_all(const Factors<float>& f) {
  return {broadcast(f.cfg_minus_one), broadcast(f.c),     broadcast(f.c_squared), broadcast(f.a_gen),
          broadcast(f.b_gen),         broadcast(f.a),     broadcast(f.b)};
}

// One block of each input, as floats; sample and noisy from raw outputs only.
struct Inputs {
  const float *student, *teacher, *uncond, *fake, *sample, *noisy;
};

template <bool from_outputs>
TDM_FAST_INLINE void prefetch(const Inputs& in, int64_t i) {
  prefetch_input(in.student + i);
  prefetch_input(in.teacher + i);
  prefetch_input(in.uncond + i);
  prefetch_input(in.fake + i);
  if constexpr (from_outputs) {
    prefetch_input(in.sample + i);
    prefetch_input(in.noisy + i);
  }
}

template <bool huber, bool from_outputs, class V>
TDM_FAST_INLINE LossTerm<V> term(const Inputs& in, int64_t i, const Factors<V>& f) {
  const V student = at<V>(in.student, i), fake = at<V>(in.fake, i);
  const V guided = guide(at<V>(in.teacher, i), at<V>(in.uncond, i), f.cfg_minus_one);
  if constexpr (from_outputs) {
    const V x0 = f.a_gen * at<V>(in.sample, i) + f.b_gen * student;
    return tdm_term<huber>(x0, f.a * at<V>(in.noisy, i) + f.b * guided, f.b * (guided - fake), f.c, f.c_squared);
  } else {
    return tdm_term<huber>(student, guided, guided - fake, f.c, f.c_squared);
  }
}

template <bool huber, bool from_outputs, bool with_gradient>
static void block_sums(const Inputs& in, float* residual, int64_t n, const Factors<float>& factors, Sum& distances,
                       Sum& values) {
  const Factors<Vec> wide = broadcast_all(factors);
  Vec distance = {}, value = {};
  for_each_element(
      n,
      [&](int64_t i) {
        if (i % 16 == 0) prefetch<from_outputs>(in, i);
        const LossTerm<Vec> v = term<huber, from_outputs, Vec>(in, i, wide);
        distance += v.distance;
        value += v.value;
        if constexpr (with_gradient) store(residual + i, v.residual);
      },
      [&] {
        distances.add(distance);
        values.add(value);
        distance = value = Vec{};
      },
      [&](int64_t i) {
        const LossTerm<float> v = term<huber, from_outputs, float>(in, i, factors);
        distances.add_one(v.distance);
        values.add_one(v.value);
        if constexpr (with_gradient) residual[i] = v.residual;
      });
}

static Factors<float> sample_factors(const TdmLossArgs& args, int64_t b) {
  Factors<float> f = {};
  f.cfg_minus_one = args.cfg != nullptr ? args.cfg[b] - 1.0f : args.cfg_minus_one;
  f.c = args.c;
  f.c_squared = args.c_squared;
  if (args.from_outputs) {
    f.a_gen = table_value(args.a, args.length, args.t_gen[b]);
    f.b_gen = table_value(args.b, args.length, args.t_gen[b]);
    f.a = table_value(args.a, args.length, args.t[b]);
    f.b = table_value(args.b, args.length, args.t[b]);
  }
  return f;
}

template <bool huber, bool from_outputs, bool with_gradient>
static void chunks(const TdmLossArgs& args, int64_t begin, int64_t end) {
  Reader student(args.student), teacher(args.teacher), uncond(args.uncond), fake(args.fake);
  Reader sample(args.sample), noisy(args.noisy);
  Writer residual(args.residual, args.shape.per_sample);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    Sum distances, values;
    for_each_block(args.shape, chunk, [&](const Block& block) {
      Inputs in = {student.read(block), teacher.read(block), uncond.read(block), fake.read(block), nullptr, nullptr};
      if constexpr (from_outputs) {
        in.sample = sample.read(block);
        in.noisy = noisy.read(block);
      }
      float* gradient = with_gradient ? residual.floats(block) : nullptr;
      const Factors<float> factors = sample_factors(args, block.b);
      block_sums<huber, from_outputs, with_gradient>(in, gradient, block.size, factors, distances, values);
      if constexpr (with_gradient) residual.write(block);
    });
    args.slots[chunk * tdm_loss_sums] = distances.total();
    args.slots[chunk * tdm_loss_sums + 1] = values.total();
  }
}

template <bool huber, bool from_outputs>
static void chunks_of(const TdmLossArgs& args, int64_t begin, int64_t end) {
  if (args.residual.data != nullptr) {
    chunks<huber, from_outputs, true>(args, begin, end);
  } else {
    chunks<huber, from_outputs, false>(args, begin, end);
  }
}

void tdm_loss(const TdmLossArgs& args, int64_t begin, int64_t end) {
  if (args.from_outputs) {
    args.huber ? chunks_of<true, true>(args, begin, end) : chunks_of<false, true>(args, begin, end);
  } else {
    args.huber ? chunks_of<true, false>(args, begin, end) : chunks_of<false, false>(args, begin, end);
  }
}

}  // namespace TDM_FAST_ISA
}  // namespace tdm_fast
