// What the op's binding (ode_step.cpp) hands to the kernels of its library.
#pragma once

#include "dtypes.h"
#include "maths.h"

namespace tdm_fast {

struct OdeStepArgs {
  const void* sample;        // [batch, per_sample]
  const void* model_output;  // [batch, per_sample]
  void* next;                // [batch, per_sample], in sample's dtype
  DType sample_dtype, output_dtype;
  int64_t batch, per_sample;
  Tables tables;
  const int64_t *t, *t_next;  // [batch]
};

}  // namespace tdm_fast
