// Binding of sample_intervals; see ode_step.cpp for how bindings are compiled.
#include "sample_intervals.h"

#include <torch/csrc/stable/library.h>

#include "launch.h"
#include "tensors.h"

namespace tdm_fast {

#ifdef TDM_FAST_CUDA_LIBRARY
TDM_FAST_DEFINE_RUN(sample_intervals, SampleIntervalsArgs)
#else
static void run(const SampleIntervalsArgs& args, const Tensor&) {
  // A few dozen integers per sample: not worth a second thread or a vector unit.
  for (int64_t index = 0; index < args.batch; ++index) sample_interval(args, index);
}
#endif

static void sample_intervals_op(Tensor out, const OptionalTensor& seed_tensor, const OptionalTensor& iteration_tensor,
                                int64_t seed, int64_t iteration, const std::vector<int64_t>& nodes, int64_t total_steps,
                                int64_t stream, int64_t sample_offset, bool separate, bool randmid,
                                int64_t min_timestep, int64_t margin, int64_t mid_gap) {
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == 4 && out.is_contiguous() && out.scalar_type() == ScalarType::Long,
                  "out must be contiguous int64 [4, batch]");
  STD_TORCH_CHECK(!nodes.empty() && nodes.size() <= max_nodes, "nodes must be 1 to ", max_nodes, " timesteps");
  SampleIntervalsArgs args;
  args.out = static_cast<int64_t*>(out.mutable_data_ptr());
  args.batch = out.size(1);
  args.draw = make_draw(seed_tensor, iteration_tensor, seed, iteration, stream, sample_offset, purpose_intervals, out);
  args.num_steps = static_cast<int32_t>(nodes.size());
  for (int32_t i = 0; i < args.num_steps; ++i) args.nodes[i] = static_cast<int32_t>(nodes[i]);
  args.total_steps = static_cast<int32_t>(total_steps);
  args.min_timestep = static_cast<int32_t>(min_timestep);
  args.margin = static_cast<int32_t>(margin);
  args.mid_gap = static_cast<int32_t>(mid_gap);
  args.separate = separate;
  args.randmid = randmid;
  if (args.batch > 0) run(args, out);
}

}  // namespace tdm_fast

STABLE_TORCH_LIBRARY_FRAGMENT(TDM_FAST_NAMESPACE, m) {
  m.def(
      "sample_intervals(Tensor(a!) out, Tensor? seed_tensor, Tensor? iteration_tensor, int seed, int iteration, "
      "int[] nodes, int total_steps, int stream, int sample_offset, bool separate, bool randmid, int min_timestep, "
      "int margin, int mid_gap) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(TDM_FAST_NAMESPACE, TDM_FAST_KEY, m) {
  m.impl("sample_intervals", TORCH_BOX(&tdm_fast::sample_intervals_op));
}
