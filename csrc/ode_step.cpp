// Binding of ode_step: schema, checks and registration. Compiled into both op libraries; TDM_FAST_NAMESPACE and
// TDM_FAST_KEY (tdm_fast_cpu and CPU, tdm_fast_cuda and CUDA) come from the build.
#include "ode_step.h"

#include <torch/csrc/stable/library.h>

#include "launch.h"
#include "tensors.h"

namespace tdm_fast {

TDM_FAST_DEFINE_RUN(ode_step, OdeStepArgs)

static Tensor ode_step_op(const Tensor& sample, const Tensor& model_output, const Tensor& a, const Tensor& b,
                          const Tensor& c, const Tensor& d, const Tensor& alpha, const Tensor& sigma, const Tensor& t,
                          const Tensor& t_next) {
  OdeStepArgs args;
  args.shape = latent_shape(sample, "sample");
  args.sample = latent(sample, sample, "sample");
  args.model_output = latent(model_output, sample, "model_output");
  args.tables = make_tables(a, b, c, d, alpha, sigma, sample);
  args.t = timesteps(t, args.shape.batch, sample, "t");
  args.t_next = timesteps(t_next, args.shape.batch, sample, "t_next");
  Tensor next = new_latents(sample, sample.scalar_type());
  args.next = output(next);
  if (sample.numel() > 0) run(args, sample);
  return next;
}

#ifndef TDM_FAST_CUDA_LIBRARY
TDM_FAST_DEFINE_RUN(ode_step_backward, OdeStepBackwardArgs)

// A gradient that is not wanted comes back empty.
static std::tuple<Tensor, Tensor> ode_step_backward_op(const Tensor& gradient, const Tensor& a, const Tensor& b,
                                                       const Tensor& c, const Tensor& d, const Tensor& alpha,
                                                       const Tensor& sigma, const Tensor& t, const Tensor& t_next,
                                                       ScalarType sample_dtype, ScalarType output_dtype,
                                                       bool to_sample, bool to_model_output) {
  OdeStepBackwardArgs args;
  args.shape = latent_shape(gradient, "gradient");
  args.gradient = latent(gradient, gradient, "gradient");
  args.tables = make_tables(a, b, c, d, alpha, sigma, gradient);
  args.t = timesteps(t, args.shape.batch, gradient, "t");
  args.t_next = timesteps(t_next, args.shape.batch, gradient, "t_next");
  Tensor first = to_sample ? new_latents(gradient, sample_dtype) : new_vector(gradient, 0);
  Tensor second = to_model_output ? new_latents(gradient, output_dtype) : new_vector(gradient, 0);
  args.to_sample = to_sample ? output(first) : Output{nullptr, DType::float32};
  args.to_model_output = to_model_output ? output(second) : Output{nullptr, DType::float32};
  if (gradient.numel() > 0) run(args, gradient);
  return {first, second};
}
#endif

}  // namespace tdm_fast

STABLE_TORCH_LIBRARY_FRAGMENT(TDM_FAST_NAMESPACE, m) {
  m.def(
      "ode_step(Tensor sample, Tensor model_output, Tensor a, Tensor b, Tensor c, Tensor d, Tensor alpha, "
      "Tensor sigma, Tensor t, Tensor t_next) -> Tensor");
#ifndef TDM_FAST_CUDA_LIBRARY
  m.def(
      "ode_step_backward(Tensor gradient, Tensor a, Tensor b, Tensor c, Tensor d, Tensor alpha, Tensor sigma, "
      "Tensor t, Tensor t_next, ScalarType sample_dtype, ScalarType output_dtype, bool to_sample, "
      "bool to_model_output) -> (Tensor, Tensor)");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(TDM_FAST_NAMESPACE, TDM_FAST_KEY, m) {
  m.impl("ode_step", TORCH_BOX(&tdm_fast::ode_step_op));
#ifndef TDM_FAST_CUDA_LIBRARY
  m.impl("ode_step_backward", TORCH_BOX(&tdm_fast::ode_step_backward_op));
#endif
}
