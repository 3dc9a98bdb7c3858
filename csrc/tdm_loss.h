// What the bindings of tdm_loss and tdm_loss_from_outputs (tdm_loss.cpp) hand to the kernels of their library.
#pragma once

#include "latent.h"
#include "maths.h"

namespace tdm_fast {

struct TdmLossArgs {
  // x0, x0_teacher, x0_uncond, x0_fake; from raw outputs: model_output, out_teacher, out_uncond, out_fake.
  Latent student, teacher, uncond, fake;
  // From raw outputs only: x0 = a[t_gen] * sample + b[t_gen] * student, x0_teacher = a[t] * noisy + b[t] * teacher, ...
  bool from_outputs;
  Latent sample, noisy;
  const float *a, *b;
  int64_t length;
  const int64_t *t_gen, *t;  // [batch]
  const float* cfg;          // [batch], or null: then cfg_minus_one for all
  float cfg_minus_one;
  bool huber;
  float c, c_squared;
  Output residual;  // data is null: no gradient is wanted
  Shape shape;
  double* slots;  // two sums per chunk: distance, value
  float* loss;    // one number: sum of tdm_sample_loss(...).value over the batch, divided by all elements
  float* scale;   // [batch], tdm_sample_loss(...).scale with output_factor b[t_gen] from raw outputs, else 1
};

constexpr int64_t tdm_loss_sums = 2;

}  // namespace tdm_fast
