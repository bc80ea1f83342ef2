// The matrix kernels in 256-bit registers: several rows of activations against one panel.
//
// Dot is the one thing AVX2 and AVX-VNNI do differently: dot(sum, codes, x) adds the products of
// 32 codes with 32 activations to a register of partial sums, widen(sum) makes 8 int32 of it.
// A tile of R <= kRows rows x 16 outputs keeps 2R partial sums, times chains(R), in registers, in
// none of which a product waits long for the one before it; kRows is what gcc keeps all there.
// kFused says whether the first tile of a block of rows can unpack the codes on its way; else
// they are unpacked before it, for want of registers.
#ifndef BITNET_CPU_TILE256_H_
#define BITNET_CPU_TILE256_H_

#include "blocking.h"
#include "vector256.h"

namespace bitnet_cpu {
namespace {

// One quarter of a step: inputs J, 4 + J, 8 + J, 12 + J. The first tile of a block of rows
// unpacks the codes and leaves them in `unpacked` for the others.
template <class Dot, int R, bool First, int J>
inline __attribute__((always_inline)) void quarter_step(const uint8_t* x, int64_t stride,
                                                        const uint8_t* packed,
                                                        uint8_t* unpacked, __m256i (&sum)[R][2]) {
  __m256i low, high;
  if (First) {
    low = codes<J>(load256(packed));
    high = codes<J>(load256(packed + 32));
    store256(unpacked + 64 * J, low);
    store256(unpacked + 64 * J + 32, high);
  } else {
    low = load256(unpacked + 64 * J);
    high = load256(unpacked + 64 * J + 32);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const __m256i four = broadcast4(x + r * stride + 4 * J);
    sum[r][0] = Dot::dot(sum[r][0], low, four);
    sum[r][1] = Dot::dot(sum[r][1], high, four);
  }
}

// unpacked [steps, 4, 64]: the codes of every step, a byte each.
inline void unpack256(const uint8_t* packed, int64_t steps, uint8_t* unpacked) {
  for (int64_t i = 0; i < 2 * steps; ++i, packed += 32) {
    uint8_t* out = unpacked + i / 2 * 4 * kStepBytes + i % 2 * 32;
    const __m256i words = load256(packed);
    store256(out, codes<0>(words));
    store256(out + kStepBytes, codes<1>(words));
    store256(out + 2 * kStepBytes, codes<2>(words));
    store256(out + 3 * kStepBytes, codes<3>(words));
  }
}

// sums [R, 16] += x [R, 16 * steps] . codes.
template <class Dot, int R, bool First>
inline void tile(const uint8_t* x, int64_t stride, const uint8_t* packed, uint8_t* unpacked,
                 int64_t steps, int32_t* sums) {
  constexpr int kChains = Dot::chains(R);
  __m256i sum[kChains][R][2];
#pragma GCC unroll 4
  for (int c = 0; c < kChains; ++c) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[c][r][0] = sum[c][r][1] = _mm256_setzero_si256();
  }
  for (int64_t t = 0; t < steps; ++t) {
    quarter_step<Dot, R, First, 0>(x, stride, packed, unpacked, sum[0]);
    quarter_step<Dot, R, First, 1>(x, stride, packed, unpacked, sum[1 % kChains]);
    quarter_step<Dot, R, First, 2>(x, stride, packed, unpacked, sum[2 % kChains]);
    quarter_step<Dot, R, First, 3>(x, stride, packed, unpacked, sum[3 % kChains]);
    x += kStep;
    packed += First ? kStepBytes : 0;
    unpacked += 4 * kStepBytes;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < 2; ++v) {
      int32_t* out = sums + r * kPanel + v * 8;
      __m256i all = load256(out);
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) all = _mm256_add_epi32(all, Dot::widen(sum[c][r][v]));
      store256(out, all);
    }
  }
}

// Rows [1, kRows] as a template argument.
template <class Dot, bool First, int R = Dot::kRows>
inline void tile_rows(int rows, const uint8_t* x, int64_t stride, const uint8_t* packed,
                      uint8_t* unpacked, int64_t steps, int32_t* sums) {
  if constexpr (R > 1) {
    if (rows < R)
      return tile_rows<Dot, First, R - 1>(rows, x, stride, packed, unpacked, steps, sums);
  }
  tile<Dot, R, First>(x, stride, packed, unpacked, steps, sums);
}

// One input of 16 in a step, J, for R rows of float activations. The two low bits of a word
// shifted right by 2J pick its weight from a table of four floats.
template <int R, int J>
inline __attribute__((always_inline)) void float_input(const uint8_t* x, int64_t stride,
                                                       __m256i low, __m256i high,
                                                       __m256 (&sum)[R][2]) {
  const __m256 weights = _mm256_setr_ps(-1, 0, 1, 0, -1, 0, 1, 0);
  const __m256 w0 = _mm256_permutevar_ps(weights, _mm256_srli_epi32(low, 2 * J));
  const __m256 w1 = _mm256_permutevar_ps(weights, _mm256_srli_epi32(high, 2 * J));
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const __m256 value = _mm256_broadcast_ss((const float*)(x + r * stride) + J);
    sum[r][0] = _mm256_fmadd_ps(value, w0, sum[r][0]);
    sum[r][1] = _mm256_fmadd_ps(value, w1, sum[r][1]);
  }
}

template <int R, int J = 0>
inline __attribute__((always_inline)) void float_step(const uint8_t* x, int64_t stride,
                                                      __m256i low, __m256i high,
                                                      __m256 (&even)[R][2],
                                                      __m256 (&odd)[R][2]) {
  if constexpr (J < kStep) {
    float_input<R, J>(x, stride, low, high, J % 2 ? odd : even);
    float_step<R, J + 1>(x, stride, low, high, even, odd);
  }
}

// sums [R, 16] = x [R, 16 * steps] . w in float32, even and odd inputs apart: one chain of
// additions alone would wait for itself.
template <int R>
inline void float_rows(const uint8_t* x, int64_t stride, const uint8_t* packed, int64_t steps,
                       float* sums) {
  __m256 even[R][2], odd[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    even[r][0] = even[r][1] = odd[r][0] = odd[r][1] = _mm256_setzero_ps();
  for (int64_t t = 0; t < steps; ++t) {
    float_step<R>(x, stride, load256(packed), load256(packed + 32), even, odd);
    x += kStep * sizeof(float);
    packed += kStepBytes;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < 2; ++v)
      _mm256_storeu_ps(sums + r * kPanel + v * 8, _mm256_add_ps(even[r][v], odd[r][v]));
  }
}

// What every x86 Isa does in 256-bit registers.
struct Float256 {
  static constexpr int64_t kFloatRows = 3;

  static void float_tile(int rows, const uint8_t* x, int64_t stride, const uint8_t* packed,
                         int64_t steps, float* sums) {
    if (rows == 1) return float_rows<1>(x, stride, packed, steps, sums);
    if (rows == 2) return float_rows<2>(x, stride, packed, steps, sums);
    return float_rows<3>(x, stride, packed, steps, sums);
  }
  static void store_half(const float* values, uint16_t* half) { store_half16(values, half); }
};

// What an Isa of 256-bit registers has beside its gemv.
template <class Dot>
struct Isa256 : Float256 {
  static constexpr int64_t kRows = Dot::kRows;
  static constexpr bool kEvenTiles = Dot::kEvenTiles;
  static constexpr int64_t kTilePanels = 1;
  static constexpr int64_t kChunkSteps = 16;

  template <bool First>
  static void products(int rows, const uint8_t* x, int64_t stride, Packed<1> packed,
                       int64_t steps, uint8_t* unpacked, int32_t* sums) {
    if (First && !Dot::kFused) unpack256(packed.first, steps, unpacked);
    tile_rows<Dot, First && Dot::kFused>(rows, x, stride, packed.first, unpacked, steps, sums);
  }
};

}  // namespace
}  // namespace bitnet_cpu

#endif  // BITNET_CPU_TILE256_H_
