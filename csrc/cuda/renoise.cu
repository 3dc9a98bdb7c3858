// renoise on the GPU: x0 and the noised latents in one pass, the normals made on the way, and the sums of log_weight.
#include "../renoise.h"

#include "sums.cuh"

namespace tdm_fast {
namespace cuda {

// The normals of 8 elements from `begin` on, of two Philox blocks.
TDM_FAST_INLINE void make_noise(const PhiloxKey& key, int64_t begin, float (&noise)[pack]) {
#pragma unroll
  for (int j = 0; j < pack; j += 4) {
    const Words words = philox(key, static_cast<uint32_t>((begin + j) / 4));
    const Pair low = normal_pair(words.w0, words.w1), high = normal_pair(words.w2, words.w3);
    noise[j] = low.first;
    noise[j + 1] = low.second;
    noise[j + 2] = high.first;
    noise[j + 3] = high.second;
  }
}

template <class T>
__global__ void __launch_bounds__(threads) renoise_kernel(const __grid_constant__ RenoiseArgs args, int64_t chunks) {
  const Place place = place_of_block(chunks);
  const int64_t b = place.sample;
  const RenoiseScale s = renoise_scale(args.tables, args.t_gen[b], args.t_mid[b], args.t[b]);
  const RenoiseFactors<float> factors = {s.a, s.b, s.c, s.d, s.alpha_mid, s.sigma_mid, s.ratio, s.kept, s.beta};
  const PhiloxKey key = philox_key(args.draw, b);
  double sums[renoise_sums] = {};
#pragma unroll 1
  for (int64_t offset = 0; offset < chunk_elements; offset += tile) {
    const Span span = span_at(args.shape, b, place.part * chunk_elements + offset);
    if (span.count == 0) break;
    const Loaded<T> sample = load<T>(args.sample, span), model_output = load<T>(args.model_output, span);
    float noise[pack], x0[pack], noisy[pack], noise_squares[pack], mixed_squares[pack];
    if (args.noise.data == nullptr) {
      make_noise(key, span.begin, noise);
    } else {
      const Loaded<T> given = load<T>(args.noise, span);
#pragma unroll
      for (int j = 0; j < pack; ++j) noise[j] = element(given, j);
    }
#pragma unroll
    for (int j = 0; j < pack; ++j) {
      const Renoised<float> result = renoise(element(sample, j), element(model_output, j), noise[j], factors);
      x0[j] = result.x0;
      noisy[j] = result.noisy;
      noise_squares[j] = noise[j] * noise[j];
      mixed_squares[j] = result.mixed * result.mixed;
    }
    store(args.x0, args.shape.per_sample, span, x0);
    store(args.noisy, args.shape.per_sample, span, noisy);
    add_to(sums[0], noise_squares, span.count);
    add_to(sums[1], mixed_squares, span.count);
  }
  write_block_sums(sums, args.slots + blockIdx.x * renoise_sums);
}

struct FinishRenoise {
  Shape shape;
  const float* sigma;
  int64_t length;
  const int64_t* t;
  float* log_weight;

  __device__ double per_sample(int64_t b, const double (&sums)[renoise_sums]) const {
    const float sigma_t = table_value_or_clean(sigma, length, t[b], 0.0f);
    log_weight[b] = renoise_log_weight(sums[0], sums[1], shape.per_sample, sigma_t);
    return 0;
  }
  __device__ void total(double) const {}
};

const char* renoise(const RenoiseArgs& args, void* stream) {
  const int64_t chunks = chunks_per_sample(args.shape.per_sample);
  // Noise that is not given has no dtype that could differ.
  const Latent noise = args.noise.data == nullptr ? args.sample : args.noise;
  const char* error = by_dtype({args.sample, args.model_output, noise}, args.shape, [&](auto tag) {
    return start(renoise_kernel<decltype(tag)>, args.shape.batch * chunks, threads, stream, args, chunks);
  });
  if (error != nullptr) return error;
  const FinishRenoise finish = {args.shape, args.tables.sigma, args.tables.length, args.t, args.log_weight};
  return start_finish<renoise_sums>(args.slots, args.shape, finish, stream);
}

}  // namespace cuda
}  // namespace tdm_fast
