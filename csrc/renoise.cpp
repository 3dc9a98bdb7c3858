// Binding of renoise; see ode_step.cpp for how bindings are compiled.
#include "renoise.h"

#include <torch/csrc/stable/library.h>

#include "launch.h"
#include "tensors.h"

namespace tdm_fast {

TDM_FAST_DEFINE_RUN(renoise, RenoiseArgs)

#ifdef TDM_FAST_CUDA_LIBRARY
static void finish(const RenoiseArgs&) {}
#else
static void finish(const RenoiseArgs& args) {
  const int64_t chunks = chunks_per_sample(args.shape.per_sample);
  for (int64_t b = 0; b < args.shape.batch; ++b) {
    double noise_squares = 0, mixed_squares = 0;
    for (int64_t slot = b * chunks; slot < (b + 1) * chunks; ++slot) {
      noise_squares += args.slots[slot * renoise_sums];
      mixed_squares += args.slots[slot * renoise_sums + 1];
    }
    const float sigma = renoise_scale(args.tables, args.t_gen[b], args.t_mid[b], args.t[b]).sigma;
    args.log_weight[b] = renoise_log_weight(noise_squares, mixed_squares, args.shape.per_sample, sigma);
  }
}
#endif

static std::tuple<Tensor, Tensor, Tensor> renoise_op(
    const Tensor& sample, const Tensor& model_output, const Tensor& a, const Tensor& b, const Tensor& c,
    const Tensor& d, const Tensor& alpha, const Tensor& sigma, const Tensor& t_gen, const Tensor& t_mid,
    const Tensor& t, const OptionalTensor& seed_tensor, const OptionalTensor& iteration_tensor, int64_t seed,
    int64_t iteration, int64_t stream, int64_t sample_offset, const OptionalTensor& noise) {
  RenoiseArgs args;
  args.shape = latent_shape(sample, "sample");
  args.sample = latent(sample, sample, "sample");
  args.model_output = latent(model_output, sample, "model_output");
  args.noise = noise.has_value() ? latent(*noise, sample, "noise") : Latent{nullptr, 0, 0, DType::float32};
  args.draw = make_draw(seed_tensor, iteration_tensor, seed, iteration, stream, sample_offset, purpose_renoise, sample);
  args.tables = make_tables(a, b, c, d, alpha, sigma, sample);
  args.t_gen = timesteps(t_gen, args.shape.batch, sample, "t_gen");
  args.t_mid = timesteps(t_mid, args.shape.batch, sample, "t_mid");
  args.t = timesteps(t, args.shape.batch, sample, "t");
  Tensor noisy = new_latents(sample, sample.scalar_type()), x0 = new_latents(sample, sample.scalar_type());
  Tensor log_weight = new_vector(sample, args.shape.batch);
  const Tensor slots = new_slots(sample, args.shape, renoise_sums);
  args.noisy = output(noisy);
  args.x0 = output(x0);
  args.log_weight = static_cast<float*>(log_weight.mutable_data_ptr());
  args.slots = static_cast<double*>(slots.mutable_data_ptr());
  if (sample.numel() > 0) {
    run(args, sample);
    finish(args);
  } else {
    torch::stable::fill_(log_weight, nan_value);
  }
  return {noisy, x0, log_weight};
}

}  // namespace tdm_fast

STABLE_TORCH_LIBRARY_FRAGMENT(TDM_FAST_NAMESPACE, m) {
  m.def(
      "renoise(Tensor sample, Tensor model_output, Tensor a, Tensor b, Tensor c, Tensor d, Tensor alpha, Tensor sigma, "
      "Tensor t_gen, Tensor t_mid, Tensor t, Tensor? seed_tensor, Tensor? iteration_tensor, int seed, int iteration, "
      "int stream, int sample_offset, Tensor? noise) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(TDM_FAST_NAMESPACE, TDM_FAST_KEY, m) {
  m.impl("renoise", TORCH_BOX(&tdm_fast::renoise_op));
}
