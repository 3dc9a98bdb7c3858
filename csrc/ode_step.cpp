// Binding of ode_step: schema, checks and registration. Compiled into both op libraries; TDM_FAST_NAMESPACE and
// TDM_FAST_KEY (tdm_fast_cpu and CPU, tdm_fast_cuda and CUDA) come from the build.
#include "ode_step.h"

#include <torch/csrc/stable/library.h>

#include "launch.h"
#include "tensors.h"

namespace tdm_fast {

#ifdef TDM_FAST_CUDA_LIBRARY
namespace cuda {
const char* ode_step(const OdeStepArgs& args, void* stream);
}
static void run(const OdeStepArgs& args, const Tensor& sample) {
  on_current_stream(sample, [&](void* stream) { return cuda::ode_step(args, stream); });
}
#else
TDM_FAST_DECLARE_FOR_EACH_ISA(void ode_step(const OdeStepArgs& args, int64_t begin, int64_t end))
static void run(const OdeStepArgs& args, const Tensor&) {
  const auto kernel = TDM_FAST_SELECT_ISA(ode_step);
  in_parallel(args.batch * args.per_sample, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}
#endif

static Tensor ode_step_op(const Tensor& sample, const Tensor& model_output, const Tensor& a, const Tensor& b,
                          const Tensor& c, const Tensor& d, const Tensor& alpha, const Tensor& sigma, const Tensor& t,
                          const Tensor& t_next) {
  check_contiguous(sample, "sample");
  check_contiguous(model_output, "model_output");
  STD_TORCH_CHECK(sample.dim() >= 1, "sample must have a batch dimension");
  STD_TORCH_CHECK(model_output.sizes().equals(sample.sizes()), "model_output must have sample's shape");
  STD_TORCH_CHECK(model_output.device() == sample.device(), "model_output must be on sample's device");
  Tensor next = torch::stable::empty_like(sample);
  const int64_t batch = sample.size(0), length = a.numel();
  const auto table = [&](const Tensor& values, const char* name) {
    return vector_data<float>(values, ScalarType::Float, length, sample, name);
  };
  OdeStepArgs args;
  args.sample = sample.const_data_ptr();
  args.model_output = model_output.const_data_ptr();
  args.next = next.mutable_data_ptr();
  args.sample_dtype = latent_dtype(sample, "sample");
  args.output_dtype = latent_dtype(model_output, "model_output");
  args.batch = batch;
  args.per_sample = batch == 0 ? 0 : sample.numel() / batch;
  args.tables = {table(a, "a"),         table(b, "b"),         table(c, "c"), table(d, "d"),
                 table(alpha, "alpha"), table(sigma, "sigma"), length};
  args.t = vector_data<int64_t>(t, ScalarType::Long, batch, sample, "t");
  args.t_next = vector_data<int64_t>(t_next, ScalarType::Long, batch, sample, "t_next");
  if (sample.numel() > 0) run(args, sample);
  return next;
}

}  // namespace tdm_fast

STABLE_TORCH_LIBRARY_FRAGMENT(TDM_FAST_NAMESPACE, m) {
  m.def(
      "ode_step(Tensor sample, Tensor model_output, Tensor a, Tensor b, Tensor c, Tensor d, Tensor alpha, Tensor "
      "sigma, "
      "Tensor t, Tensor t_next) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(TDM_FAST_NAMESPACE, TDM_FAST_KEY, m) {
  m.impl("ode_step", TORCH_BOX(&tdm_fast::ode_step_op));
}
