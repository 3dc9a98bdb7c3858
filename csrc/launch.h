// How a binding starts its kernels: on torch's threads (CPU library) or on torch's current stream (CUDA library).
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

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

#else

#include "cpu/instruction_set.h"

namespace tdm_fast {

// Calls `range(begin, end)` for parts of [0, elements) on torch's intra-op threads.
template <class Range>
void in_parallel(int64_t elements, const Range& range) {
  // torch's own grain for element-wise loops: below it a second thread costs more than it gives.
  constexpr int64_t grain = 32768;
  torch::stable::parallel_for(0, elements, grain, range);
}

}  // namespace tdm_fast

#endif
