// Bindings of fake_score_loss and fake_score_loss_from_outputs; see ode_step.cpp for how bindings are compiled.
#include "fake_score_loss.h"

#include <torch/csrc/stable/library.h>

#include <utility>

#include "launch.h"
#include "tensors.h"

namespace tdm_fast {

TDM_FAST_DEFINE_RUN(fake_score_loss, FakeScoreLossArgs)

#ifdef TDM_FAST_CUDA_LIBRARY
static void finish(const FakeScoreLossArgs&) {}
#else
static void finish(const FakeScoreLossArgs& args) {
  const int64_t chunks = chunks_per_sample(args.shape.per_sample);
  const int64_t elements = args.shape.batch * args.shape.per_sample;
  double total = 0;
  for (int64_t b = 0; b < args.shape.batch; ++b) {
    double squares = 0;
    for (int64_t slot = b * chunks; slot < (b + 1) * chunks; ++slot) squares += args.slots[slot];
    const float snr = args.from_outputs ? table_value(args.snr, args.length, args.t[b]) : args.snr[b];
    const float factor = args.from_outputs ? table_value(args.b, args.length, args.t[b]) : 1.0f;
    const float log_weight = args.log_weight != nullptr ? args.log_weight[b] : 0.0f;
    const SampleLoss loss = fake_sample_loss(squares, snr, args.snr_gamma, log_weight, elements, factor);
    total += loss.value;
    args.scale[b] = loss.scale;
  }
  *args.loss = static_cast<float>(total / static_cast<double>(elements));
}
#endif

using LossOutputs = std::tuple<Tensor, Tensor, Tensor>;

// What both ops share; `args` has the inputs already, `fake` is what the gradient goes to.
static LossOutputs run_loss(FakeScoreLossArgs& args, const Tensor& fake, const OptionalTensor& log_weight,
                            double snr_gamma, bool with_gradient) {
  const Shape shape = args.shape = latent_shape(fake, "x0_fake");
  args.log_weight = floats_or_null(log_weight, shape.batch, fake, "log_weight");
  args.snr_gamma = static_cast<float>(snr_gamma);
  Tensor residual = new_residual(fake, fake.scalar_type(), false, with_gradient);
  Tensor loss = new_scalar(fake), scale = new_vector(fake, shape.batch);
  const Tensor slots = new_slots(fake, shape, fake_score_loss_sums);
  args.residual = residual_output(residual, with_gradient);
  args.slots = static_cast<double*>(slots.mutable_data_ptr());
  args.loss = static_cast<float*>(loss.mutable_data_ptr());
  args.scale = static_cast<float*>(scale.mutable_data_ptr());
  if (fake.numel() > 0) {
    run(args, fake);
    finish(args);
  } else {
    torch::stable::fill_(loss, nan_value);
    torch::stable::fill_(scale, nan_value);
  }
  return {std::move(loss), std::move(residual), std::move(scale)};
}

static LossOutputs fake_score_loss_op(const Tensor& x0_fake, const Tensor& x0, const Tensor& snr,
                                      const OptionalTensor& log_weight, double snr_gamma, bool with_gradient) {
  FakeScoreLossArgs args = {};
  args.fake = latent(x0_fake, x0_fake, "x0_fake");
  args.x0 = latent(x0, x0_fake, "x0");
  args.snr = floats(snr, x0_fake.size(0), x0_fake, "snr");
  return run_loss(args, x0_fake, log_weight, snr_gamma, with_gradient);
}

static LossOutputs fake_score_loss_from_outputs_op(const Tensor& model_output, const Tensor& noisy, const Tensor& x0,
                                                   const Tensor& a, const Tensor& b, const Tensor& snr, const Tensor& t,
                                                   const OptionalTensor& log_weight, double snr_gamma,
                                                   bool with_gradient) {
  FakeScoreLossArgs args = {};
  args.fake = latent(model_output, model_output, "model_output");
  args.noisy = latent(noisy, model_output, "noisy");
  args.x0 = latent(x0, model_output, "x0");
  args.from_outputs = true;
  args.length = a.numel();
  args.a = floats(a, args.length, model_output, "a");
  args.b = floats(b, args.length, model_output, "b");
  args.snr = floats(snr, args.length, model_output, "snr");
  args.t = timesteps(t, model_output.size(0), model_output, "t");
  return run_loss(args, model_output, log_weight, snr_gamma, with_gradient);
}

}  // namespace tdm_fast

STABLE_TORCH_LIBRARY_FRAGMENT(TDM_FAST_NAMESPACE, m) {
  m.def(
      "fake_score_loss(Tensor x0_fake, Tensor x0, Tensor snr, Tensor? log_weight, float snr_gamma, "
      "bool with_gradient) -> (Tensor, Tensor, Tensor)");
  m.def(
      "fake_score_loss_from_outputs(Tensor model_output, Tensor noisy, Tensor x0, Tensor a, Tensor b, Tensor snr, "
      "Tensor t, Tensor? log_weight, float snr_gamma, bool with_gradient) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(TDM_FAST_NAMESPACE, TDM_FAST_KEY, m) {
  m.impl("fake_score_loss", TORCH_BOX(&tdm_fast::fake_score_loss_op));
  m.impl("fake_score_loss_from_outputs", TORCH_BOX(&tdm_fast::fake_score_loss_from_outputs_op));
}
