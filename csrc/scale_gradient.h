// What the op's binding (scale_gradient.cpp) hands to the kernels of its library.
#pragma once

#include "latent.h"
#include "maths.h"

namespace tdm_fast {

struct ScaleGradientArgs {
  Latent residual;
  const float* scale;  // [batch]
  // float32; a scalar has both strides 0, one number per sample element_stride 0.
  Latent grad_output;
  Output gradient;
  Shape shape;
};

}  // namespace tdm_fast
