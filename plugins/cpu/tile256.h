// The matrix kernels in 256-bit registers: several rows of activations against one panel.
//
// Dot is the one thing AVX2 and AVX-VNNI do differently: dot(sum, codes, x) adds the products of
// 32 codes with 32 activations to a register of partial sums, widen(sum) makes 8 int32 of it.
// A tile of R rows x 16 outputs keeps 2R partial sums in registers; with R = 4 gcc keeps them all there.
#ifndef BITNET_CPU_TILE256_H_
#define BITNET_CPU_TILE256_H_

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

// sums [R, 16] += x [R, 16 * steps] . codes.
template <class Dot, int R, bool First>
inline void tile(const uint8_t* x, int64_t stride, const uint8_t* packed, uint8_t* unpacked,
                 int64_t steps, int32_t* sums) {
  __m256i sum[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
  for (int64_t t = 0; t < steps; ++t) {
    quarter_step<Dot, R, First, 0>(x, stride, packed, unpacked, sum);
    quarter_step<Dot, R, First, 1>(x, stride, packed, unpacked, sum);
    quarter_step<Dot, R, First, 2>(x, stride, packed, unpacked, sum);
    quarter_step<Dot, R, First, 3>(x, stride, packed, unpacked, sum);
    x += kStep;
    packed += First ? kStepBytes : 0;
    unpacked += 4 * kStepBytes;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < 2; ++v) {
      int32_t* out = sums + r * kPanel + v * 8;
      store256(out, _mm256_add_epi32(load256(out), Dot::widen(sum[r][v])));
    }
  }
}

// Rows [1, kRows] as a template argument.
template <class Dot, bool First>
inline void tile_rows(int rows, const uint8_t* x, int64_t stride, const uint8_t* packed,
                      uint8_t* unpacked, int64_t steps, int32_t* sums) {
  switch (rows) {
    case 1: return tile<Dot, 1, First>(x, stride, packed, unpacked, steps, sums);
    case 2: return tile<Dot, 2, First>(x, stride, packed, unpacked, steps, sums);
    case 3: return tile<Dot, 3, First>(x, stride, packed, unpacked, steps, sums);
    default: return tile<Dot, 4, First>(x, stride, packed, unpacked, steps, sums);
  }
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

// What an Isa of 256-bit registers has beside its gemv.
template <class Dot>
struct Isa256 {
  static constexpr int64_t kRows = 4;
  static constexpr int64_t kChunkSteps = 16;
  static constexpr int64_t kFloatRows = 3;

  static void first_tile(int rows, const uint8_t* x, int64_t stride, const uint8_t* packed,
                         int64_t steps, uint8_t* unpacked, int32_t* sums) {
    tile_rows<Dot, true>(rows, x, stride, packed, unpacked, steps, sums);
  }
  static void next_tile(int rows, const uint8_t* x, int64_t stride, uint8_t* unpacked,
                        int64_t steps, int32_t* sums) {
    tile_rows<Dot, false>(rows, x, stride, nullptr, unpacked, steps, sums);
  }
  static void float_tile(int rows, const uint8_t* x, int64_t stride, const uint8_t* packed,
                         int64_t steps, float* sums) {
    if (rows == 1) return float_rows<1>(x, stride, packed, steps, sums);
    if (rows == 2) return float_rows<2>(x, stride, packed, steps, sums);
    return float_rows<3>(x, stride, packed, steps, sums);
  }
  static void store_half(const float* values, uint16_t* half) { store_half16(values, half); }
};

}  // namespace
}  // namespace bitnet_cpu

#endif  // BITNET_CPU_TILE256_H_
