// What the op's binding (ode_step.cpp) hands to the kernels of its library.
#pragma once

#include "latent.h"
#include "maths.h"

namespace tdm_fast {

struct OdeStepArgs {
  Latent sample, model_output;
  Output next;  // in sample's dtype
  Shape shape;
  Tables tables;
  const int64_t *t, *t_next;  // [batch]
};

// From the gradient of `next` those of both inputs, on the CPU; elsewhere plain torch computes them.
struct OdeStepBackwardArgs {
  Latent gradient;
  Output to_sample, to_model_output;  // data is null: that gradient is not wanted
  Shape shape;
  Tables tables;
  const int64_t *t, *t_next;  // [batch]
};

}  // namespace tdm_fast
