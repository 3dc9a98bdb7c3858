// Bindings of tdm_loss and tdm_loss_from_outputs; see ode_step.cpp for how bindings are compiled.
#include "tdm_loss.h"

#include <torch/csrc/stable/library.h>

#include <utility>

#include "launch.h"
#include "tensors.h"

namespace tdm_fast {

TDM_FAST_DEFINE_RUN(tdm_loss, TdmLossArgs)

#ifdef TDM_FAST_CUDA_LIBRARY
static void finish(const TdmLossArgs&) {}
#else
static void finish(const TdmLossArgs& args) {
  const int64_t chunks = chunks_per_sample(args.shape.per_sample);
  const int64_t elements = args.shape.batch * args.shape.per_sample;
  double total = 0;
  for (int64_t b = 0; b < args.shape.batch; ++b) {
    double distance = 0, value = 0;
    for (int64_t slot = b * chunks; slot < (b + 1) * chunks; ++slot) {
      distance += args.slots[slot * tdm_loss_sums];
      value += args.slots[slot * tdm_loss_sums + 1];
    }
    const float factor = args.from_outputs ? table_value(args.b, args.length, args.t_gen[b]) : 1.0f;
    const SampleLoss loss = tdm_sample_loss(args.huber, distance, value, args.shape.per_sample, elements, factor);
    total += loss.value;
    args.scale[b] = loss.scale;
  }
  *args.loss = static_cast<float>(total / static_cast<double>(elements));
}
#endif

using LossOutputs = std::tuple<Tensor, Tensor, Tensor>;

// What both ops share; `args` has the inputs already, `student` is what the gradient goes to.
static LossOutputs run_loss(TdmLossArgs& args, const Tensor& student, const OptionalTensor& cfg, double cfg_value,
                            std::optional<double> huber_c, bool with_gradient) {
  const Shape shape = args.shape = latent_shape(student, "x0");
  args.cfg = floats_or_null(cfg, shape.batch, student, "cfg");
  args.cfg_minus_one = static_cast<float>(cfg_value - 1.0);
  args.huber = huber_c.has_value();
  args.c = static_cast<float>(huber_c.value_or(0.0));
  args.c_squared = static_cast<float>(huber_c.value_or(0.0) * huber_c.value_or(0.0));
  Tensor residual = new_residual(student, student.scalar_type(), args.huber, with_gradient);
  Tensor loss = new_scalar(student), scale = new_vector(student, shape.batch);
  const Tensor slots = new_slots(student, shape, tdm_loss_sums);
  args.residual = residual_output(residual, with_gradient);
  args.slots = static_cast<double*>(slots.mutable_data_ptr());
  args.loss = static_cast<float*>(loss.mutable_data_ptr());
  args.scale = static_cast<float*>(scale.mutable_data_ptr());
  if (student.numel() > 0) {
    run(args, student);
    finish(args);
  } else {
    torch::stable::fill_(loss, nan_value);
    torch::stable::fill_(scale, nan_value);
  }
  return {std::move(loss), std::move(residual), std::move(scale)};
}

static LossOutputs tdm_loss_op(const Tensor& x0, const Tensor& x0_teacher, const Tensor& x0_uncond,
                               const Tensor& x0_fake, const OptionalTensor& cfg, double cfg_value,
                               std::optional<double> huber_c, bool with_gradient) {
  TdmLossArgs args = {};
  args.student = latent(x0, x0, "x0");
  args.teacher = latent(x0_teacher, x0, "x0_teacher");
  args.uncond = latent(x0_uncond, x0, "x0_uncond");
  args.fake = latent(x0_fake, x0, "x0_fake");
  return run_loss(args, x0, cfg, cfg_value, huber_c, with_gradient);
}

static LossOutputs tdm_loss_from_outputs_op(const Tensor& model_output, const Tensor& sample, const Tensor& noisy,
                                            const Tensor& out_teacher, const Tensor& out_uncond, const Tensor& out_fake,
                                            const Tensor& a, const Tensor& b, const Tensor& t_gen, const Tensor& t,
                                            const OptionalTensor& cfg, double cfg_value, std::optional<double> huber_c,
                                            bool with_gradient) {
  TdmLossArgs args = {};
  args.student = latent(model_output, model_output, "model_output");
  args.teacher = latent(out_teacher, model_output, "out_teacher");
  args.uncond = latent(out_uncond, model_output, "out_uncond");
  args.fake = latent(out_fake, model_output, "out_fake");
  args.sample = latent(sample, model_output, "sample");
  args.noisy = latent(noisy, model_output, "noisy");
  args.from_outputs = true;
  args.length = a.numel();
  args.a = floats(a, args.length, model_output, "a");
  args.b = floats(b, args.length, model_output, "b");
  args.t_gen = timesteps(t_gen, model_output.size(0), model_output, "t_gen");
  args.t = timesteps(t, model_output.size(0), model_output, "t");
  return run_loss(args, model_output, cfg, cfg_value, huber_c, with_gradient);
}

}  // namespace tdm_fast

STABLE_TORCH_LIBRARY_FRAGMENT(TDM_FAST_NAMESPACE, m) {
  m.def(
      "tdm_loss(Tensor x0, Tensor x0_teacher, Tensor x0_uncond, Tensor x0_fake, Tensor? cfg, float cfg_value, "
      "float? huber_c, bool with_gradient) -> (Tensor, Tensor, Tensor)");
  m.def(
      "tdm_loss_from_outputs(Tensor model_output, Tensor sample, Tensor noisy, Tensor out_teacher, Tensor out_uncond, "
      "Tensor out_fake, Tensor a, Tensor b, Tensor t_gen, Tensor t, Tensor? cfg, float cfg_value, float? huber_c, "
      "bool with_gradient) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(TDM_FAST_NAMESPACE, TDM_FAST_KEY, m) {
  m.impl("tdm_loss", TORCH_BOX(&tdm_fast::tdm_loss_op));
  m.impl("tdm_loss_from_outputs", TORCH_BOX(&tdm_fast::tdm_loss_from_outputs_op));
}
