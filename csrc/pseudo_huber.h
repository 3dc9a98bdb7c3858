// What the op's binding (pseudo_huber.cpp) hands to the kernels of its library.
#pragma once

#include "latent.h"
#include "maths.h"

namespace tdm_fast {

enum class Reduction : int { mean, sum, none, per_sample };

struct PseudoHuberArgs {
  Latent input, target;
  const float* weight;  // [batch], or null for 1
  float c, c_squared;
  Reduction reduction;
  Output residual;  // error / root, error = input - target; data is null: no gradient is wanted
  Shape shape;
  double* slots;  // one sum per chunk: root - c, not weighted; null for `none`
  float* value;   // one number, [batch] for per_sample, contiguous [batch, per_sample] for none: (root - c) * weight
  float* scale;   // [batch], huber_scale of the weight
};

constexpr int64_t pseudo_huber_sums = 1;

// Factor of a sample's residuals, and of its sum of root - c: the weight over what the reduction divides by.
TDM_FAST_INLINE double huber_scale(Reduction reduction, float weight, Shape shape) {
  const double per_sample = static_cast<double>(shape.per_sample);
  if (reduction == Reduction::mean) return weight / (static_cast<double>(shape.batch) * per_sample);
  if (reduction == Reduction::per_sample) return weight / per_sample;
  return weight;
}

}  // namespace tdm_fast
