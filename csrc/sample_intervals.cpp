// Binding of sample_intervals; see ode_step.cpp for how bindings are compiled.
#include "sample_intervals.h"

#include <torch/csrc/stable/library.h>

#include <utility>

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

// What stays the same from draw to draw comes packed in one int64 tensor on the CPU, whatever the device: read as an
// argument, it costs less than each of its numbers would. sample_intervals.py (Settings) packs it in this order.
static void unpack(const Tensor& settings, SampleIntervalsArgs& args) {
  constexpr int64_t before_nodes = 7;
  STD_TORCH_CHECK(settings.is_cpu() && settings.dim() == 1 && settings.is_contiguous() &&
                      settings.scalar_type() == ScalarType::Long,
                  "settings must be a contiguous int64 vector on the CPU");
  const int64_t nodes = settings.numel() - before_nodes;
  STD_TORCH_CHECK(nodes >= 1 && nodes <= max_nodes, "settings must have 1 to ", max_nodes, " timesteps");
  const int64_t* p = static_cast<const int64_t*>(settings.const_data_ptr());
  args.draw.stream = static_cast<uint32_t>(p[0]);
  args.total_steps = static_cast<int32_t>(p[1]);
  args.separate = p[2] != 0;
  args.randmid = p[3] != 0;
  args.min_timestep = static_cast<int32_t>(p[4]);
  args.margin = static_cast<int32_t>(p[5]);
  args.mid_gap = static_cast<int32_t>(p[6]);
  args.num_steps = static_cast<int32_t>(nodes);
  for (int64_t i = 0; i < nodes; ++i) args.nodes[i] = static_cast<int32_t>(p[before_nodes + i]);
}

// Four tensors, on the device of `like`: views of one would cost as much again as the draw.
static std::tuple<Tensor, Tensor, Tensor, Tensor> sample_intervals_op(const Tensor& like, const Tensor& settings,
                                                                      const OptionalTensor& seed_tensor,
                                                                      const OptionalTensor& iteration_tensor,
                                                                      int64_t seed, int64_t iteration, int64_t batch,
                                                                      int64_t sample_offset) {
  SampleIntervalsArgs args;
  args.draw = make_draw(seed_tensor, iteration_tensor, seed, iteration, 0, sample_offset, purpose_intervals, like);
  unpack(settings, args);
  Tensor k = new_vector<ScalarType::Long>(like, batch), t_gen = new_vector<ScalarType::Long>(like, batch);
  Tensor t_mid = new_vector<ScalarType::Long>(like, batch), t = new_vector<ScalarType::Long>(like, batch);
  args.k = static_cast<int64_t*>(k.mutable_data_ptr());
  args.t_gen = static_cast<int64_t*>(t_gen.mutable_data_ptr());
  args.t_mid = static_cast<int64_t*>(t_mid.mutable_data_ptr());
  args.t = static_cast<int64_t*>(t.mutable_data_ptr());
  args.batch = batch;
  if (batch > 0) run(args, like);
  return {std::move(k), std::move(t_gen), std::move(t_mid), std::move(t)};
}

}  // namespace tdm_fast

STABLE_TORCH_LIBRARY_FRAGMENT(TDM_FAST_NAMESPACE, m) {
  m.def(
      "sample_intervals(Tensor like, Tensor settings, Tensor? seed_tensor, Tensor? iteration_tensor, int seed, "
      "int iteration, int batch, int sample_offset) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(TDM_FAST_NAMESPACE, TDM_FAST_KEY, m) {
  m.impl("sample_intervals", TORCH_BOX(&tdm_fast::sample_intervals_op));
}
