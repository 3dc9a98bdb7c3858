// Binding of pseudo_huber; see ode_step.cpp for how bindings are compiled.
#include "pseudo_huber.h"

#include <torch/csrc/stable/library.h>

#include <string>

#include "launch.h"
#include "tensors.h"

namespace tdm_fast {

TDM_FAST_DEFINE_RUN(pseudo_huber, PseudoHuberArgs)

#ifdef TDM_FAST_CUDA_LIBRARY
static void finish(const PseudoHuberArgs&) {}
#else
static void finish(const PseudoHuberArgs& args) {
  const int64_t chunks = chunks_per_sample(args.shape.per_sample);
  double total = 0;
  for (int64_t b = 0; b < args.shape.batch; ++b) {
    const double scale = huber_scale(args.reduction, args.weight != nullptr ? args.weight[b] : 1.0f, args.shape);
    args.scale[b] = static_cast<float>(scale);
    if (args.reduction == Reduction::none) continue;
    double value = 0;
    for (int64_t slot = b * chunks; slot < (b + 1) * chunks; ++slot) value += args.slots[slot];
    total += scale * value;
    if (args.reduction == Reduction::per_sample) args.value[b] = static_cast<float>(scale * value);
  }
  if (args.reduction == Reduction::mean || args.reduction == Reduction::sum) *args.value = static_cast<float>(total);
}
#endif

static Reduction to_reduction(const std::string& name) {
  if (name == "mean") return Reduction::mean;
  if (name == "sum") return Reduction::sum;
  if (name == "none") return Reduction::none;
  STD_TORCH_CHECK(name == "per_sample", "reduction is ", name, "; it must be mean, sum, none or per_sample");
  return Reduction::per_sample;
}

static Tensor new_value(const Tensor& input, Reduction reduction) {
  if (reduction == Reduction::none) return new_latents(input, ScalarType::Float);
  return reduction == Reduction::per_sample ? new_vector(input, input.size(0)) : new_scalar(input);
}

static std::tuple<Tensor, Tensor, Tensor> pseudo_huber_op(const Tensor& input, const Tensor& target, double c,
                                                          const OptionalTensor& weight, std::string reduction,
                                                          bool with_gradient) {
  PseudoHuberArgs args = {};
  args.shape = latent_shape(input, "input");
  args.input = latent(input, input, "input");
  args.target = latent(target, input, "target");
  args.weight = floats_or_null(weight, args.shape.batch, input, "weight");
  args.c = static_cast<float>(c);
  args.c_squared = static_cast<float>(c * c);
  args.reduction = to_reduction(reduction);
  // Both may get a gradient: the residual is kept in a dtype that serves either.
  const bool alike = input.scalar_type() == target.scalar_type();
  Tensor residual = new_residual(input, alike ? input.scalar_type() : ScalarType::Float, true, with_gradient);
  Tensor value = new_value(input, args.reduction), scale = new_vector(input, args.shape.batch);
  const bool summed = args.reduction != Reduction::none;
  const Tensor slots = summed ? new_slots(input, args.shape, pseudo_huber_sums) : new_vector(input, 0);
  args.residual = residual_output(residual, with_gradient);
  args.slots = summed ? static_cast<double*>(slots.mutable_data_ptr()) : nullptr;
  args.value = static_cast<float*>(value.mutable_data_ptr());
  args.scale = static_cast<float*>(scale.mutable_data_ptr());
  if (input.numel() > 0) {
    run(args, input);
    finish(args);
  } else {
    torch::stable::fill_(value, args.reduction == Reduction::sum ? 0.0 : nan_value);
    torch::stable::fill_(scale, nan_value);
  }
  return {value, residual, scale};
}

}  // namespace tdm_fast

STABLE_TORCH_LIBRARY_FRAGMENT(TDM_FAST_NAMESPACE, m) {
  m.def(
      "pseudo_huber(Tensor input, Tensor target, float c, Tensor? weight, str reduction, bool with_gradient) -> "
      "(Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(TDM_FAST_NAMESPACE, TDM_FAST_KEY, m) {
  m.impl("pseudo_huber", TORCH_BOX(&tdm_fast::pseudo_huber_op));
}
