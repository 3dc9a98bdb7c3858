// Latents of any dtype as short blocks of floats in the first-level cache: kernels compute on floats alone, instead of
// being compiled for every combination of dtypes. Included by files that are compiled once per instruction set.
#pragma once

#include "../latent.h"
#include "vec.h"

namespace tdm_fast {
namespace TDM_FAST_ISA {

constexpr int64_t block_elements = 512;
static_assert(chunk_elements % block_elements == 0, "chunks are cut into whole blocks");

// Elements [begin, begin + size) of sample b.
struct Block {
  int64_t b, begin, size;
};

TDM_FAST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Calls body(block) for all blocks of a chunk, in order.
template <class Body>
TDM_FAST_INLINE void for_each_block(Shape shape, int64_t chunk, const Body& body) {
  const int64_t chunks = chunks_per_sample(shape.per_sample), b = chunk / chunks;
  int64_t begin = (chunk - b * chunks) * chunk_elements;
  const int64_t end = smaller(begin + chunk_elements, shape.per_sample);
  for (; begin < end; begin += block_elements) body(Block{b, begin, smaller(block_elements, end - begin)});
}

// Asks for what an input has `ahead` bytes further on, past the end included, which a prefetch may be. The processor's own
// prefetchers begin anew at every page of every input. Non-temporal: an input is read once, and should not push out of
// the last-level cache the residual beside it, which the backward reads next.
template <class T>
TDM_FAST_INLINE void prefetch_input(const T* p) {
  constexpr uintptr_t ahead = 512;
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + ahead), 0, 0);
}

template <class T>
static void to_floats(const T* p, float* floats, int64_t n) {
  int64_t i = 0;
  for (; i + width <= n; i += width) {
    if (i * static_cast<int64_t>(sizeof(T)) % 64 == 0) prefetch_input(p + i);
    store(floats + i, load(p + i));
  }
  if (i < n) store_tail(floats + i, load_tail(p + i, n - i), n - i);
}

template <class T>
static void from_floats(const float* floats, T* p, int64_t n) {
  int64_t i = 0;
  for (; i + width <= n; i += width) store(p + i, load(floats + i));
  if (i < n) store_tail(p + i, load_tail(floats + i, n - i), n - i);
}

// An input, block by block.
class Reader {
 public:
  explicit Reader(const Latent& latent) : latent_(latent) {}

  // The block's elements; valid until the next call.
  const float* read(const Block& block) {
    const int64_t first = block.b * latent_.batch_stride + block.begin * latent_.element_stride;
    switch (latent_.dtype) {
      case DType::float32:
        return read_floats(static_cast<const float*>(latent_.data) + first, block.size);
      case DType::bfloat16:
        return convert(static_cast<const BFloat16*>(latent_.data) + first, block.size);
      default:
        return convert(static_cast<const Half*>(latent_.data) + first, block.size);
    }
  }

 private:
  const float* read_floats(const float* p, int64_t n) { return latent_.element_stride == 1 ? p : convert(p, n); }

  template <class T>
  const float* convert(const T* p, int64_t n) {
    if (latent_.element_stride == 1) {
      to_floats(p, buffer_, n);
    } else {
      to_floats(p, buffer_, 1);
      for (int64_t i = 1; i < n; ++i) buffer_[i] = buffer_[0];
    }
    return buffer_;
  }

  const Latent latent_;
  alignas(64) float buffer_[block_elements];
};

// An output, block by block: fill what `floats` gives, then `write` it.
class Writer {
 public:
  Writer(const Output& output, int64_t per_sample) : output_(output), per_sample_(per_sample) {}

  float* floats(const Block& block) {
    return output_.dtype == DType::float32 ? static_cast<float*>(output_.data) + first(block) : buffer_;
  }

  void write(const Block& block) {
    if (output_.dtype == DType::bfloat16) {
      from_floats(buffer_, static_cast<BFloat16*>(output_.data) + first(block), block.size);
    } else if (output_.dtype == DType::float16) {
      from_floats(buffer_, static_cast<Half*>(output_.data) + first(block), block.size);
    }
  }

 private:
  int64_t first(const Block& block) const { return block.b * per_sample_ + block.begin; }

  const Output output_;
  const int64_t per_sample_;
  alignas(64) float buffer_[block_elements];
};

// Calls `vectors(i)` for whole registers, in runs, `flush()` after every run, then `single(i)` for the elements left.
template <class Vectors, class Flush, class Single>
TDM_FAST_INLINE void for_each_element(int64_t n, const Vectors& vectors, const Flush& flush, const Single& single) {
  const int64_t whole = n - n % width;
  int64_t i = 0;
  for (; i + run_length * width <= whole; i += run_length * width) {
    // Unrolled, so that one register's root and division run beside the next one's.
#pragma GCC unroll 8
    for (int64_t j = 0; j < run_length * width; j += width) vectors(i + j);
    flush();
  }
  if (i < whole) {
    for (; i < whole; i += width) vectors(i);
    flush();
  }
  for (; i < n; ++i) single(i);
}

}  // namespace TDM_FAST_ISA
}  // namespace tdm_fast
