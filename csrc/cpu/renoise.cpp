// renoise on the CPU, for the chunks [begin, end) of the batch. Compiled once per instruction set.
#include "../renoise.h"

#include "blocks.h"

namespace tdm_fast {
namespace TDM_FAST_ISA {

// Philox blocks that are worked on at once: arrays of words, in loops that the compiler turns into vector code.
constexpr int lanes = 32;
static_assert(block_elements % (4 * lanes) == 0, "a block's normals come in whole groups");

// The normals of the block's elements, and up to 4 * lanes - 1 more.
static void normals(const PhiloxKey& key, const Block& block, float* noise) {
  uint32_t words[4][lanes];
  float pairs[4][lanes];
  for (int64_t i = 0; i < block.size; i += 4 * lanes) {
    const uint32_t first = static_cast<uint32_t>((block.begin + i) / 4);
    for (int lane = 0; lane < lanes; ++lane) {
      const Words w = philox(key, first + static_cast<uint32_t>(lane));
      words[0][lane] = w.w0;
      words[1][lane] = w.w1;
      words[2][lane] = w.w2;
      words[3][lane] = w.w3;
    }
    for (int half = 0; half < 4; half += 2) {
      for (int lane = 0; lane < lanes; ++lane) {
        const Pair pair = normal_pair(words[half][lane], words[half + 1][lane]);
        pairs[half][lane] = pair.first;
        pairs[half + 1][lane] = pair.second;
      }
    }
    for (int lane = 0; lane < lanes; ++lane) {
      for (int j = 0; j < 4; ++j) noise[i + 4 * lane + j] = pairs[j][lane];
    }
  }
}

static RenoiseFactors<float> factors_of(const RenoiseScale& s) {
  return {s.a, s.b, s.c, s.d, s.alpha_mid, s.sigma_mid, s.ratio, s.kept, s.beta};
}

static RenoiseFactors<Vec> broadcast_all(const RenoiseFactors<float>& f) {
  return {broadcast(f.a),         broadcast(f.b),     broadcast(f.c),    broadcast(f.d),   broadcast(f.alpha_mid),
          broadcast(f.sigma_mid), broadcast(f.ratio), broadcast(f.kept), broadcast(f.beta)};
}

// One block of each latent, as floats.
struct Pointers {
  const float *sample, *model_output, *noise;
  float *noisy, *x0;
};

static void renoise_block(const Pointers& p, int64_t n, const RenoiseFactors<float>& factors, Sum& noise_squares,
                          Sum& mixed_squares) {
  const RenoiseFactors<Vec> wide = broadcast_all(factors);
  Vec noise_square = {}, mixed_square = {};
  for_each_element(
      n,
      [&](int64_t i) {
        const Vec noise = load(p.noise + i);
        const Renoised<Vec> v = tdm_fast::renoise<Vec>(load(p.sample + i), load(p.model_output + i), noise, wide);
        store(p.x0 + i, v.x0);
        store(p.noisy + i, v.noisy);
        noise_square += noise * noise;
        mixed_square += v.mixed * v.mixed;
      },
      [&] {
        noise_squares.add(noise_square);
        mixed_squares.add(mixed_square);
        noise_square = mixed_square = Vec{};
      },
      [&](int64_t i) {
        const float noise = p.noise[i];
        const Renoised<float> v = tdm_fast::renoise<float>(p.sample[i], p.model_output[i], noise, factors);
        p.x0[i] = v.x0;
        p.noisy[i] = v.noisy;
        noise_squares.add_one(noise * noise);
        mixed_squares.add_one(v.mixed * v.mixed);
      });
}

void renoise(const RenoiseArgs& args, int64_t begin, int64_t end) {
  Reader sample(args.sample), model_output(args.model_output), noise(args.noise);
  Writer noisy(args.noisy, args.shape.per_sample), x0(args.x0, args.shape.per_sample);
  alignas(64) float drawn[block_elements];
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    Sum noise_squares, mixed_squares;
    for_each_block(args.shape, chunk, [&](const Block& block) {
      const int64_t b = block.b;
      if (args.noise.data == nullptr) normals(philox_key(args.draw, b), block, drawn);
      const Pointers pointers = {sample.read(block), model_output.read(block),
                                 args.noise.data != nullptr ? noise.read(block) : drawn, noisy.floats(block),
                                 x0.floats(block)};
      const RenoiseScale scale = renoise_scale(args.tables, args.t_gen[b], args.t_mid[b], args.t[b]);
      renoise_block(pointers, block.size, factors_of(scale), noise_squares, mixed_squares);
      noisy.write(block);
      x0.write(block);
    });
    args.slots[chunk * renoise_sums] = noise_squares.total();
    args.slots[chunk * renoise_sums + 1] = mixed_squares.total();
  }
}

}  // namespace TDM_FAST_ISA
}  // namespace tdm_fast
