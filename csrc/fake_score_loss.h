// What the bindings of fake_score_loss and fake_score_loss_from_outputs (fake_score_loss.cpp) hand to the kernels of
// their library.
#pragma once

#include "latent.h"
#include "maths.h"

namespace tdm_fast {

struct FakeScoreLossArgs {
  // x0_fake and x0; from raw outputs: model_output and x0, with x0_fake = a[t] * noisy + b[t] * model_output.
  Latent fake, x0;
  bool from_outputs;
  Latent noisy;
  const float *a, *b;
  int64_t length;
  const int64_t* t;         // [batch], from raw outputs only
  const float* snr;         // [batch]; from raw outputs the table [length], at t
  const float* log_weight;  // [batch], or null for 0
  float snr_gamma;
  Output residual;  // x0_fake - x0; data is null: no gradient is wanted
  Shape shape;
  double* slots;  // one sum per chunk: error^2
  float* loss;    // one number: sum of fake_sample_loss(...).value over the batch, divided by all elements
  float* scale;   // [batch], fake_sample_loss(...).scale with output_factor b[t] from raw outputs, else 1
};

constexpr int64_t fake_score_loss_sums = 1;

}  // namespace tdm_fast
