// Enough of CUDA for the kernels of csrc/cuda to run on a CPU, so that tests without a GPU run their very source.
//
// A block's threads are fibers that one operating system thread runs in turn, blocks come one after the other. Each fiber
// runs until the next __syncthreads or shuffle; all of the block must then stand at the same one, which is checked. Not
// emulated: warps that diverge, races between threads, the device's own rounding of intrinsics.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct uint4 {
  uint32_t x, y, z, w;
};

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline dim3 threadIdx, blockIdx, gridDim;

namespace emulation {

enum class At { start, barrier, shuffle_written, shuffle_read, end };

struct Fiber {
  jmp_buf resume;
  ucontext_t start;
  std::unique_ptr<char[]> stack;
  At at;
};

constexpr size_t stack_bytes = 1 << 16;
inline std::deque<Fiber> fibers;
inline std::function<void()> body;
inline jmp_buf scheduler;
inline uint64_t exchanged[1024];

// Contexts begin a fiber; jumps, which unlike swapcontext ask the kernel for nothing, go on from there.
inline void stop(At where) {
  Fiber& fiber = fibers[threadIdx.x];
  fiber.at = where;
  if (_setjmp(fiber.resume) == 0) _longjmp(scheduler, 1);
}

inline void run_fiber() {
  while (true) {
    body();
    stop(At::end);
  }
}

inline void add_fiber() {
  Fiber& fiber = fibers.emplace_back();
  fiber.stack.reset(new char[stack_bytes]);
  fiber.at = At::start;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = stack_bytes;
  makecontext(&fiber.start, &run_fiber, 0);
}

inline void run_thread(unsigned index) {
  threadIdx.x = index;
  if (_setjmp(scheduler) != 0) return;
  if (fibers[index].at == At::start) setcontext(&fibers[index].start);
  _longjmp(fibers[index].resume, 1);
}

inline void run_block(unsigned threads) {
  while (fibers.size() < threads) add_fiber();
  do {
    for (unsigned i = 0; i < threads; ++i) {
      run_thread(i);
      if (fibers[i].at == fibers[0].at) continue;
      std::fprintf(stderr, "threads 0 and %u of a block are not at the same barrier\n", i);
      std::abort();
    }
  } while (fibers[0].at != At::end);
}

template <class T>
T shuffle(T value, unsigned source) {
  std::memcpy(&exchanged[threadIdx.x], &value, sizeof(T));
  stop(At::shuffle_written);
  std::memcpy(&value, &exchanged[source], sizeof(T));
  stop(At::shuffle_read);
  return value;
}

}  // namespace emulation

inline void __stcs(uint4* p, uint4 value) { *p = value; }

inline void __syncthreads() { emulation::stop(emulation::At::barrier); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::shuffle(value, threadIdx.x ^ static_cast<unsigned>(mask));
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  gridDim = config->gridDim;
  emulation::body = [&] { kernel(arguments...); };
  for (unsigned i = 0; i < gridDim.x; ++i) {
    blockIdx.x = i;
    emulation::run_block(config->blockDim.x);
  }
  return cudaSuccess;
}
