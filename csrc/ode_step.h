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

}  // namespace tdm_fast
