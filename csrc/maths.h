// Element-wise maths, shared by the CPU and the CUDA kernels so that what is tested on the CPU is what runs on the GPU.
//
// Each formula is a template over the value type: float in CUDA threads, a vector register in CPU loops. Both are
// compiled without contraction to fused multiply-add, so that every implementation rounds as the plain torch definition
// does.
#pragma once

#include <cstdint>

// The CPU kernels are compiled once per instruction set. Internal linkage keeps the linker from merging an AVX-512 copy
// of these functions into code that runs on processors without it.
#ifdef __CUDACC__
#define TDM_FAST_INLINE static __device__ __forceinline__
#else
#define TDM_FAST_INLINE static inline __attribute__((always_inline))
#endif

namespace tdm_fast {

// A schedule's tables over the training timesteps: x_t = alpha*x0 + sigma*eps, x0 = a*x_t + b*out, eps = c*x_t + d*out.
struct Tables {
  const float *a, *b, *c, *d, *alpha, *sigma;
  int64_t length;
};

// Factors of one sample: next = sample_scale * sample + output_scale * model_output.
struct StepScale {
  float sample, output;
};

// The deterministic sub-step from t to t_next (arXiv 2503.06674); t_next = -1 asks for x0. A timestep outside the
// tables gives NaN: on a GPU nobody could look at it beforehand without waiting for the device.
TDM_FAST_INLINE StepScale step_scale(const Tables& tables, int64_t t, int64_t t_next) {
  if (t < 0 || t >= tables.length || t_next < -1 || t_next >= tables.length) {
    const float nan = __builtin_nanf("");
    return {nan, nan};
  }
  if (t_next == -1) return {tables.a[t], tables.b[t]};
  const float alpha = tables.alpha[t_next], sigma = tables.sigma[t_next];
  return {alpha * tables.a[t] + sigma * tables.c[t], alpha * tables.b[t] + sigma * tables.d[t]};
}

template <class V>
TDM_FAST_INLINE V ode_step(V sample, V model_output, V sample_scale, V output_scale) {
  return sample * sample_scale + model_output * output_scale;
}

}  // namespace tdm_fast
