// fake_score_loss and fake_score_loss_from_outputs on the GPU: loss and gradient in one pass.
#include "../fake_score_loss.h"

#include "sums.cuh"

namespace tdm_fast {
namespace cuda {

template <class T, bool from_outputs>
__global__ void __launch_bounds__(threads)
    fake_score_loss_kernel(const __grid_constant__ FakeScoreLossArgs args, int64_t chunks) {
  const Place place = place_of_block(chunks);
  const int64_t b = place.sample;
  float scale_a = 0, scale_b = 0;
  if constexpr (from_outputs) {
    scale_a = table_value(args.a, args.length, args.t[b]);
    scale_b = table_value(args.b, args.length, args.t[b]);
  }
  double sums[fake_score_loss_sums] = {};
#pragma unroll 1
  for (int64_t offset = 0; offset < chunk_elements; offset += tile) {
    const Span span = span_at(args.shape, b, place.part * chunk_elements + offset);
    if (span.count == 0) break;
    const Loaded<T> fake = load<T>(args.fake, span), x0 = load<T>(args.x0, span);
    Loaded<T> noisy = {};
    if constexpr (from_outputs) noisy = load<T>(args.noisy, span);
    float squares[pack], residual[pack];
#pragma unroll
    for (int j = 0; j < pack; ++j) {
      float x0_fake = element(fake, j);
      if constexpr (from_outputs) x0_fake = scale_a * element(noisy, j) + scale_b * x0_fake;
      const LossTerm<float> term = penalty<false>(x0_fake - element(x0, j), 0.0f, 0.0f);
      squares[j] = term.value;
      residual[j] = term.residual;
    }
    if (args.residual.data != nullptr) store(args.residual, args.shape.per_sample, span, residual);
    add_to(sums[0], squares, span.count);
  }
  write_block_sums(sums, args.slots + blockIdx.x * fake_score_loss_sums);
}

struct FinishFakeScoreLoss {
  FakeScoreLossArgs args;

  __device__ int64_t elements() const { return args.shape.batch * args.shape.per_sample; }
  __device__ double per_sample(int64_t b, const double (&sums)[fake_score_loss_sums]) const {
    float snr = 0, output_factor = 1;
    if (args.from_outputs) {
      snr = table_value(args.snr, args.length, args.t[b]);
      output_factor = table_value(args.b, args.length, args.t[b]);
    } else {
      snr = args.snr[b];
    }
    const float log_weight = args.log_weight != nullptr ? args.log_weight[b] : 0.0f;
    const SampleLoss loss = fake_sample_loss(sums[0], snr, args.snr_gamma, log_weight, elements(), output_factor);
    args.scale[b] = loss.scale;
    return loss.value;
  }
  __device__ void total(double value) const { *args.loss = static_cast<float>(value / elements()); }
};

template <bool from_outputs>
static const char* start_fake_score_loss(const FakeScoreLossArgs& args, void* stream) {
  const int64_t chunks = chunks_per_sample(args.shape.per_sample);
  const Latent noisy = from_outputs ? args.noisy : args.x0;
  return by_dtype({args.fake, args.x0, noisy}, args.shape, [&](auto tag) {
    constexpr auto kernel = fake_score_loss_kernel<decltype(tag), from_outputs>;
    return start(kernel, args.shape.batch * chunks, threads, stream, args, chunks);
  });
}

const char* fake_score_loss(const FakeScoreLossArgs& args, void* stream) {
  const char* error =
      args.from_outputs ? start_fake_score_loss<true>(args, stream) : start_fake_score_loss<false>(args, stream);
  if (error != nullptr) return error;
  return start_finish<fake_score_loss_sums>(args.slots, args.shape, FinishFakeScoreLoss{args}, stream);
}

}  // namespace cuda
}  // namespace tdm_fast
