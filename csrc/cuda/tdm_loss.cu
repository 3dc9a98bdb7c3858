// tdm_loss and tdm_loss_from_outputs on the GPU: loss, its normaliser and gradient in one pass.
#include "../tdm_loss.h"

#include "sums.cuh"

namespace tdm_fast {
namespace cuda {

// Factors of one sample's raw outputs.
struct OutputScale {
  float a_gen, b_gen, a, b;
};

// What a thread has loaded of each latent.
template <class T>
struct TdmElements {
  Loaded<T> student, teacher, uncond, fake, sample, noisy;
};

template <bool huber, bool from_outputs, class T>
TDM_FAST_INLINE void tdm_terms(const TdmLossArgs& args, const TdmElements<T>& e, const OutputScale& scale,
                               float cfg_minus_one, float (&distance)[pack], float (&value)[pack],
                               float (&residual)[pack]) {
#pragma unroll
  for (int j = 0; j < pack; ++j) {
    float x0 = element(e.student, j);
    const float fake = element(e.fake, j);
    float guided = guide(element(e.teacher, j), element(e.uncond, j), cfg_minus_one);
    float difference = guided - fake;
    if constexpr (from_outputs) {
      x0 = scale.a_gen * element(e.sample, j) + scale.b_gen * x0;
      difference = scale.b * difference;
      guided = scale.a * element(e.noisy, j) + scale.b * guided;
    }
    const LossTerm<float> term = tdm_term<huber>(x0, guided, difference, args.c, args.c_squared);
    distance[j] = term.distance;
    value[j] = term.value;
    residual[j] = term.residual;
  }
}

template <class T, bool from_outputs>
__global__ void __launch_bounds__(threads) tdm_loss_kernel(const __grid_constant__ TdmLossArgs args, int64_t chunks) {
  const Place place = place_of_block(chunks);
  const int64_t b = place.sample;
  const float cfg_minus_one = args.cfg != nullptr ? args.cfg[b] - 1.0f : args.cfg_minus_one;
  OutputScale scale = {};
  if constexpr (from_outputs) {
    scale.a_gen = table_value(args.a, args.length, args.t_gen[b]);
    scale.b_gen = table_value(args.b, args.length, args.t_gen[b]);
    scale.a = table_value(args.a, args.length, args.t[b]);
    scale.b = table_value(args.b, args.length, args.t[b]);
  }
  double sums[tdm_loss_sums] = {};
#pragma unroll 1
  for (int64_t offset = 0; offset < chunk_elements; offset += tile) {
    const Span span = span_at(args.shape, b, place.part * chunk_elements + offset);
    if (span.count == 0) break;
    TdmElements<T> elements = {};
    elements.student = load<T>(args.student, span);
    elements.teacher = load<T>(args.teacher, span);
    elements.uncond = load<T>(args.uncond, span);
    elements.fake = load<T>(args.fake, span);
    if constexpr (from_outputs) {
      elements.sample = load<T>(args.sample, span);
      elements.noisy = load<T>(args.noisy, span);
    }
    float distance[pack], value[pack], residual[pack];
    if (args.huber) {
      tdm_terms<true, from_outputs>(args, elements, scale, cfg_minus_one, distance, value, residual);
    } else {
      tdm_terms<false, from_outputs>(args, elements, scale, cfg_minus_one, distance, value, residual);
    }
    if (args.residual.data != nullptr) store(args.residual, args.shape.per_sample, span, residual);
    add_to(sums[0], distance, span.count);
    add_to(sums[1], value, span.count);
  }
  write_block_sums(sums, args.slots + blockIdx.x * tdm_loss_sums);
}

struct FinishTdmLoss {
  TdmLossArgs args;

  __device__ int64_t elements() const { return args.shape.batch * args.shape.per_sample; }
  __device__ double per_sample(int64_t b, const double (&sums)[tdm_loss_sums]) const {
    const float output_factor = args.from_outputs ? table_value(args.b, args.length, args.t_gen[b]) : 1.0f;
    const SampleLoss loss =
        tdm_sample_loss(args.huber, sums[0], sums[1], args.shape.per_sample, elements(), output_factor);
    args.scale[b] = loss.scale;
    return loss.value;
  }
  __device__ void total(double value) const { *args.loss = static_cast<float>(value / elements()); }
};

template <bool from_outputs>
static const char* start_tdm_loss(const TdmLossArgs& args, void* stream) {
  const int64_t chunks = chunks_per_sample(args.shape.per_sample);
  const Latent sample = from_outputs ? args.sample : args.student, noisy = from_outputs ? args.noisy : args.student;
  return by_dtype({args.student, args.teacher, args.uncond, args.fake, sample, noisy}, args.shape, [&](auto tag) {
    constexpr auto kernel = tdm_loss_kernel<decltype(tag), from_outputs>;
    return start(kernel, args.shape.batch * chunks, threads, stream, args, chunks);
  });
}

const char* tdm_loss(const TdmLossArgs& args, void* stream) {
  const char* error = args.from_outputs ? start_tdm_loss<true>(args, stream) : start_tdm_loss<false>(args, stream);
  if (error != nullptr) return error;
  return start_finish<tdm_loss_sums>(args.slots, args.shape, FinishTdmLoss{args}, stream);
}

}  // namespace cuda
}  // namespace tdm_fast
