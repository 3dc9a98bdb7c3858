// Binding of scale_gradient; see ode_step.cpp for how bindings are compiled.
#include "scale_gradient.h"

#include <torch/csrc/stable/library.h>

#include "launch.h"
#include "tensors.h"

namespace tdm_fast {

TDM_FAST_DEFINE_RUN(scale_gradient, ScaleGradientArgs)

// One number for all, one per sample, or one per element.
static Latent gradient_of_result(const Tensor& grad, const Tensor& residual) {
  if (grad.sizes().equals(residual.sizes())) return latent(grad, residual, "grad_output");
  const bool is_scalar = grad.dim() == 0;
  STD_TORCH_CHECK(is_scalar || (grad.dim() == 1 && grad.size(0) == residual.size(0)), "grad_output must be a scalar, ",
                  "one number per sample or one per element");
  STD_TORCH_CHECK(grad.device() == residual.device(), "grad_output must be on the residual's device");
  return {grad.const_data_ptr(), is_scalar ? 0 : grad.stride(0), 0, DType::float32};
}

static Tensor scale_gradient_op(const Tensor& residual, const Tensor& scale, const Tensor& grad_output,
                                ScalarType dtype) {
  STD_TORCH_CHECK(grad_output.scalar_type() == ScalarType::Float, "grad_output must be float32");
  ScaleGradientArgs args;
  args.shape = latent_shape(residual, "residual");
  args.residual = latent(residual, residual, "residual");
  args.scale = floats(scale, args.shape.batch, residual, "scale");
  args.grad_output = gradient_of_result(grad_output, residual);
  Tensor gradient = new_latents(residual, dtype);
  args.gradient = output(gradient);
  if (residual.numel() > 0) run(args, residual);
  return gradient;
}

}  // namespace tdm_fast

STABLE_TORCH_LIBRARY_FRAGMENT(TDM_FAST_NAMESPACE, m) {
  m.def("scale_gradient(Tensor residual, Tensor scale, Tensor grad_output, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(TDM_FAST_NAMESPACE, TDM_FAST_KEY, m) {
  m.impl("scale_gradient", TORCH_BOX(&tdm_fast::scale_gradient_op));
}
