// pseudo_huber on the GPU: value and gradient in one pass.
#include "../pseudo_huber.h"

#include "sums.cuh"

namespace tdm_fast {
namespace cuda {

TDM_FAST_INLINE float weight_of(const PseudoHuberArgs& args, int64_t b) {
  return args.weight != nullptr ? args.weight[b] : 1.0f;
}

template <class T>
__global__ void __launch_bounds__(threads)
    pseudo_huber_kernel(const __grid_constant__ PseudoHuberArgs args, int64_t chunks) {
  const Place place = place_of_block(chunks);
  const int64_t b = place.sample;
  const bool keeps_elements = args.reduction == Reduction::none;
  const float weight = weight_of(args, b);
  double sums[pseudo_huber_sums] = {};
#pragma unroll 1
  for (int64_t offset = 0; offset < chunk_elements; offset += tile) {
    const Span span = span_at(args.shape, b, place.part * chunk_elements + offset);
    if (span.count == 0) break;
    const Loaded<T> input = load<T>(args.input, span), target = load<T>(args.target, span);
    float values[pack], residual[pack];
#pragma unroll
    for (int j = 0; j < pack; ++j) {
      const float error = element(input, j) - element(target, j);
      const LossTerm<float> term = penalty<true>(error, args.c, args.c_squared);
      values[j] = keeps_elements ? term.value * weight : term.value;
      residual[j] = term.residual;
    }
    if (args.residual.data != nullptr) store(args.residual, args.shape.per_sample, span, residual);
    if (keeps_elements) {
      store({args.value, DType::float32}, args.shape.per_sample, span, values);
    } else {
      add_to(sums[0], values, span.count);
    }
  }
  if (!keeps_elements) {
    write_block_sums(sums, args.slots + blockIdx.x * pseudo_huber_sums);
  } else if (place.part == 0 && threadIdx.x == 0) {
    args.scale[b] = static_cast<float>(huber_scale(args.reduction, weight, args.shape));
  }
}

struct FinishPseudoHuber {
  PseudoHuberArgs args;

  __device__ double per_sample(int64_t b, const double (&sums)[pseudo_huber_sums]) const {
    const double scale = huber_scale(args.reduction, weight_of(args, b), args.shape);
    args.scale[b] = static_cast<float>(scale);
    if (args.reduction == Reduction::per_sample) args.value[b] = static_cast<float>(scale * sums[0]);
    return scale * sums[0];
  }
  __device__ void total(double value) const {
    if (args.reduction != Reduction::per_sample) *args.value = static_cast<float>(value);
  }
};

const char* pseudo_huber(const PseudoHuberArgs& args, void* stream) {
  const int64_t chunks = chunks_per_sample(args.shape.per_sample);
  const char* error = by_dtype({args.input, args.target}, args.shape, [&](auto tag) {
    return start(pseudo_huber_kernel<decltype(tag)>, args.shape.batch * chunks, threads, stream, args, chunks);
  });
  if (error != nullptr || args.reduction == Reduction::none) return error;
  return start_finish<pseudo_huber_sums>(args.slots, args.shape, FinishPseudoHuber{args}, stream);
}

}  // namespace cuda
}  // namespace tdm_fast
