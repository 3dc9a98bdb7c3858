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

static void scale_into(const Tensor& gradient, const Tensor& residual, const Tensor& scale, const Tensor& grad_output) {
  STD_TORCH_CHECK(grad_output.scalar_type() == ScalarType::Float, "grad_output must be float32");
  ScaleGradientArgs args;
  args.shape = latent_shape(residual, "residual");
  args.residual = latent(residual, residual, "residual");
  args.scale = floats(scale, args.shape.batch, residual, "scale");
  args.grad_output = gradient_of_result(grad_output, residual);
  args.gradient = output(gradient);
  if (residual.numel() > 0) run(args, residual);
}

static Tensor scale_gradient_op(const Tensor& residual, const Tensor& scale, const Tensor& grad_output,
                                ScalarType dtype) {
  Tensor gradient = new_latents(residual, dtype);
  scale_into(gradient, residual, scale, grad_output);
  return gradient;
}

// In place, for a residual that nobody needs again: no memory is fetched, and it may still be in the cache.
static void scale_gradient_in_place(Tensor residual, const Tensor& scale, const Tensor& grad_output) {
  STD_TORCH_CHECK(residual.is_contiguous(), "residual must be contiguous");
  scale_into(residual, residual, scale, grad_output);
}

}  // namespace tdm_fast

STABLE_TORCH_LIBRARY_FRAGMENT(TDM_FAST_NAMESPACE, m) {
  m.def("scale_gradient(Tensor residual, Tensor scale, Tensor grad_output, ScalarType dtype) -> Tensor");
  m.def("scale_gradient_(Tensor(a!) residual, Tensor scale, Tensor grad_output) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(TDM_FAST_NAMESPACE, TDM_FAST_KEY, m) {
  m.impl("scale_gradient", TORCH_BOX(&tdm_fast::scale_gradient_op));
  m.impl("scale_gradient_", TORCH_BOX(&tdm_fast::scale_gradient_in_place));
}
