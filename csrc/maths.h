// Element-wise maths, shared by the CPU and the CUDA kernels so that what is tested on the CPU is what runs on the GPU.
//
// Each formula of an op is a template over the value type: float in CUDA threads, a vector register in CPU loops. Both are
// compiled without contraction to fused multiply-add, so that every implementation rounds as the plain torch definition
// does. The formulas are those of arXiv 2503.06674; the docstrings of tdm_fast/ops/*.py write them out.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TDM_FAST_INLINE static __device__ __forceinline__
#else
#include <cmath>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
// The CPU kernels are compiled once per instruction set. Internal linkage keeps the linker from merging an AVX-512 copy
// of these functions into code that runs on processors without it.
#define TDM_FAST_INLINE static inline __attribute__((always_inline, unused))
#endif

namespace tdm_fast {

// ---- What the formulas need of a value type, besides + - * /.

TDM_FAST_INLINE float square_root(float v) { return __builtin_sqrtf(v); }
TDM_FAST_INLINE float absolute(float v) { return __builtin_fabsf(v); }

#ifndef __CUDACC__
#if defined(__AVX512F__)
TDM_FAST_INLINE __m512 square_root(__m512 v) { return _mm512_sqrt_ps(v); }
TDM_FAST_INLINE __m512 absolute(__m512 v) { return _mm512_abs_ps(v); }
#elif defined(__AVX2__)
TDM_FAST_INLINE __m256 square_root(__m256 v) { return _mm256_sqrt_ps(v); }
TDM_FAST_INLINE __m256 absolute(__m256 v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
#endif
#endif

// a * b + c for polynomials, where one rounding fewer only helps. Elsewhere products and sums are rounded one by one.
TDM_FAST_INLINE float multiply_add(float a, float b, float c) {
#if defined(__CUDACC__) || defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

TDM_FAST_INLINE uint32_t float_bits(float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, sizeof(bits));
  return bits;
}

TDM_FAST_INLINE float float_from_bits(uint32_t bits) {
  float v;
  __builtin_memcpy(&v, &bits, sizeof(v));
  return v;
}

// ---- Schedules.

// A schedule's tables over the training timesteps: x_t = alpha*x0 + sigma*eps, x0 = a*x_t + b*out, eps = c*x_t + d*out.
struct Tables {
  const float *a, *b, *c, *d, *alpha, *sigma;
  int64_t length;
};

// A timestep outside the table gives NaN: on a GPU nobody could look at it beforehand without waiting for the device.
TDM_FAST_INLINE float table_value(const float* table, int64_t length, int64_t t) {
  return t < 0 || t >= length ? __builtin_nanf("") : table[t];
}

// As above, with `clean` in place of t = -1, which stands for data without noise.
TDM_FAST_INLINE float table_value_or_clean(const float* table, int64_t length, int64_t t, float clean) {
  return t == -1 ? clean : table_value(table, length, t);
}

// ---- ode_step.

// Factors of one sample: next = sample_scale * sample + output_scale * model_output.
struct StepScale {
  float sample, output;
};

// The deterministic sub-step from t to t_next; t_next = -1 asks for x0.
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

// ---- renoise.

// Factors of one sample; `sigma` only divides the sum of mixed^2 when it is finished.
struct RenoiseScale {
  float a, b, c, d, alpha_mid, sigma_mid, ratio, kept, beta, sigma;
};

TDM_FAST_INLINE RenoiseScale renoise_scale(const Tables& tables, int64_t t_gen, int64_t t_mid, int64_t t) {
  const int64_t n = tables.length;
  RenoiseScale s;
  s.a = table_value(tables.a, n, t_gen);
  s.b = table_value(tables.b, n, t_gen);
  s.c = table_value(tables.c, n, t_gen);
  s.d = table_value(tables.d, n, t_gen);
  s.alpha_mid = table_value_or_clean(tables.alpha, n, t_mid, 1.0f);
  s.sigma_mid = table_value_or_clean(tables.sigma, n, t_mid, 0.0f);
  const float alpha = table_value_or_clean(tables.alpha, n, t, 1.0f);
  s.sigma = table_value_or_clean(tables.sigma, n, t, 0.0f);
  // alpha_mid is 0 at zero-terminal SNR only, where t can be no other timestep and nothing is added. NaN stays NaN.
  s.ratio = s.alpha_mid == 0.0f ? 1.0f : alpha / s.alpha_mid;
  s.kept = s.ratio * s.sigma_mid;
  // Rounding takes the difference below 0 at t = t_mid.
  const float squared = s.sigma * s.sigma - s.kept * s.kept;
  s.beta = square_root(squared < 0.0f ? 0.0f : squared);
  return s;
}

template <class V>
struct RenoiseFactors {
  V a, b, c, d, alpha_mid, sigma_mid, ratio, kept, beta;
};

template <class V>
struct Renoised {
  V x0, noisy, mixed;  // mixed: sigma_t * m
};

template <class V>
TDM_FAST_INLINE Renoised<V> renoise(V sample, V model_output, V noise, const RenoiseFactors<V>& f) {
  const V x0 = f.a * sample + f.b * model_output, eps = f.c * sample + f.d * model_output;
  const V fresh = f.beta * noise;
  return {x0, f.ratio * (f.alpha_mid * x0 + f.sigma_mid * eps) + fresh, f.kept * eps + fresh};
}

// From the sums of n^2 and of (sigma_t m)^2 over one sample.
TDM_FAST_INLINE float renoise_log_weight(double noise_squares, double mixed_squares, int64_t per_sample, float sigma) {
  const double variance = static_cast<double>(sigma) * sigma, n = static_cast<double>(per_sample);
  return static_cast<float>((noise_squares / n - mixed_squares / n / variance) / 2);
}

// ---- The losses. Per element: what is summed, and the gradient before the per-sample factor, which waits for the sum.

template <class V>
struct LossTerm {
  V distance;  // |x0 - guided|, tdm_loss only
  V value;
  V residual;
};

template <bool huber, class V>
TDM_FAST_INLINE LossTerm<V> penalty(V error, V c, V c_squared) {
  if constexpr (huber) {
    const V root = square_root(error * error + c_squared);
    return {error, root - c, error / root};
  } else {
    return {error, error * error, error};
  }
}

// The teacher's prediction under classifier-free guidance, of x0 or of raw outputs alike.
template <class V>
TDM_FAST_INLINE V guide(V teacher, V uncond, V cfg_minus_one) {
  return teacher + cfg_minus_one * (teacher - uncond);
}

// error = x0 - stopgrad(x0 + difference). x0 - x0 is 0 unless x0 is infinite or NaN, and then so is the loss.
template <bool huber, class V>
TDM_FAST_INLINE LossTerm<V> tdm_term(V x0, V guided, V difference, V c, V c_squared) {
  LossTerm<V> term = penalty<huber>((x0 - x0) - difference, c, c_squared);
  term.distance = absolute(x0 - guided);
  return term;
}

// What one sample adds to the loss (to be divided by `elements`, all of the batch) and the factor of its residuals.
struct SampleLoss {
  double value;
  float scale;
};

constexpr double weight_floor = 1e-8;

// `output_factor` is b at t_gen where the gradient goes to a raw output, else 1.
TDM_FAST_INLINE SampleLoss tdm_sample_loss(bool huber, double distance_sum, double value_sum, int64_t per_sample,
                                           int64_t elements, float output_factor) {
  const double mean = distance_sum / static_cast<double>(per_sample);
  const double weight = mean < weight_floor ? weight_floor : mean;
  const double slope = (huber ? 1.0 : 2.0) * static_cast<double>(output_factor);
  return {value_sum / weight, static_cast<float>(slope / (weight * static_cast<double>(elements)))};
}

// min(snr, snr_gamma) * exp(log_weight) is rounded as in the definition, which overflows where float32 does.
TDM_FAST_INLINE SampleLoss fake_sample_loss(double square_sum, float snr, float snr_gamma, float log_weight,
                                            int64_t elements, float output_factor) {
  const float capped = snr > snr_gamma ? snr_gamma : snr;
  const float weight = capped * static_cast<float>(exp(static_cast<double>(log_weight)));
  const double slope = 2.0 * static_cast<double>(weight) * static_cast<double>(output_factor);
  return {static_cast<double>(weight) * square_sum, static_cast<float>(slope / static_cast<double>(elements))};
}

// residual * (scale * grad_output)
template <class V>
TDM_FAST_INLINE V scale_gradient(V residual, V scale, V grad_output) {
  return residual * (scale * grad_output);
}

}  // namespace tdm_fast
