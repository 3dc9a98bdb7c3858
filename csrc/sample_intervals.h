// What the op's binding (sample_intervals.cpp) hands to the kernel of its library, and the draw of one sample.
#pragma once

#include "random.h"

namespace tdm_fast {

constexpr int max_nodes = 256;  // as MAX_NODES in tdm_fast/ops/sample_intervals.py: they travel in the arguments

struct SampleIntervalsArgs {
  int64_t *k, *t_gen, *t_mid, *t;  // [batch]
  int64_t batch;
  Draw draw;  // purpose_intervals
  int32_t nodes[max_nodes];  // the trajectory, descending: nodes[num_steps - k] is t_k
  int32_t num_steps, total_steps, min_timestep, margin, mid_gap;
  bool separate, randmid;
};

// Word 0 of the sample's first block gives k, word 1 t_mid and word 2 t; tdm_fast/ops/sample_intervals.py has the words.
TDM_FAST_INLINE void sample_interval(const SampleIntervalsArgs& args, int64_t index) {
  const Words words = philox(philox_key(args.draw, index), 0);
  const int64_t k = 1 + bounded(words.w0, args.num_steps);
  const int64_t t_gen = args.nodes[args.num_steps - k];
  int64_t t_mid = k == 1 ? 0 : args.nodes[args.num_steps - k + 1] + 1;
  if (args.randmid) t_mid += bounded(words.w1, t_gen - args.mid_gap - t_mid);
  const int64_t low = t_mid < args.min_timestep ? args.min_timestep : t_mid;
  const int64_t high = (args.separate ? t_gen : args.total_steps) - args.margin;
  args.k[index] = k;
  args.t_gen[index] = t_gen;
  args.t_mid[index] = t_mid;
  args.t[index] = low + bounded(words.w2, high - low);
}

}  // namespace tdm_fast
