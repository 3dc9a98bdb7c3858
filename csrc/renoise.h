// What the op's binding (renoise.cpp) hands to the kernels of its library.
#pragma once

#include "latent.h"
#include "random.h"

namespace tdm_fast {

struct RenoiseArgs {
  Latent sample, model_output;
  Latent noise;  // data is null: normals of `draw`, made in the kernel
  Draw draw;     // purpose_renoise
  Output noisy, x0;  // in sample's dtype
  Shape shape;
  Tables tables;
  const int64_t *t_gen, *t_mid, *t;  // [batch]
  double* slots;                     // two sums per chunk: n^2, mixed^2
  float* log_weight;                 // [batch], renoise_log_weight of the sums
};

constexpr int64_t renoise_sums = 2;

}  // namespace tdm_fast
