// How a binding starts its kernels: on torch's threads (CPU library) or on torch's current stream (CUDA library).
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "latent.h"

#ifdef TDM_FAST_CUDA_LIBRARY

namespace tdm_fast {

// Calls `launch(stream)` with the tensor's device and torch's current stream on it; an error text from it is raised.
template <class Launch>
void on_current_stream(const torch::stable::Tensor& tensor, const Launch& launch) {
  const auto index = tensor.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  const char* error = launch(stream);
  STD_TORCH_CHECK(error == nullptr, "CUDA kernel launch failed: ", error == nullptr ? "" : error);
}

}  // namespace tdm_fast

// Defines `static void run(const Args&, const Tensor&)` for an op whose kernels have its name.
#define TDM_FAST_DEFINE_RUN(op, Args)                                                    \
  namespace cuda {                                                                       \
  const char* op(const Args& args, void* stream);                                        \
  }                                                                                      \
  static void run(const Args& args, const torch::stable::Tensor& tensor) {               \
    on_current_stream(tensor, [&](void* stream) { return cuda::op(args, stream); });     \
  }

#else

#include "cpu/instruction_set.h"

namespace tdm_fast {

// Calls `range(begin, end)` for parts of the chunks of all samples, on torch's intra-op threads.
template <class Range>
void in_parallel(Shape shape, const Range& range) {
  const int64_t chunks = shape.batch * chunks_per_sample(shape.per_sample);
  // torch's own grain for element-wise loops: below it a second thread costs more than it gives.
  constexpr int64_t grain_elements = 32768;
  const int64_t chunk = shape.per_sample < chunk_elements ? shape.per_sample : chunk_elements;
  torch::stable::parallel_for(0, chunks, (grain_elements + chunk - 1) / chunk, range);
}

}  // namespace tdm_fast

// Defines `static void run(const Args&, const Tensor&)` for an op whose kernel, for chunks [begin, end), has its name.
#define TDM_FAST_DEFINE_RUN(op, Args)                                                       \
  TDM_FAST_DECLARE_FOR_EACH_ISA(void op(const Args& args, int64_t begin, int64_t end))      \
  static void run(const Args& args, const torch::stable::Tensor&) {                         \
    const auto kernel = TDM_FAST_SELECT_ISA(op);                                            \
    in_parallel(args.shape, [&](int64_t begin, int64_t end) { kernel(args, begin, end); }); \
  }

#endif
