// The AVX512-VNNI path: a step of a panel, 16 outputs x 4 codes, is one 512-bit register.
// Activations are quantized, and float activations multiplied, as on the AVX2 path.
#include "blocking.h"
#include "tile256.h"

namespace bitnet_cpu {
namespace {

inline __m512i load512(const void* p) { return _mm512_loadu_si512(p); }
inline void store512(void* p, __m512i v) { _mm512_storeu_si512(p, v); }

// sum + the products of 64 codes with 64 activations, pinned as in vector256.h: gcc would spill.
inline __m512i dot(__m512i sum, __m512i codes, __m512i x) {
  sum = _mm512_dpbusd_epi32(sum, codes, x);
#if !defined(BITNET_CPU_EMULATED)
  __asm__("" : "+v"(sum));
#endif
  return sum;
}

inline __m512i broadcast4x16(const uint8_t* p) {
  int32_t four;
  memcpy(&four, p, sizeof four);
  return _mm512_set1_epi32(four);
}

// sums [R, 16] += x [R, 16 * steps] . codes. Each row has several sums (chains), so
// that a product need not wait for the one before it.
template <int R, bool First>
inline void tile512(const uint8_t* x, int64_t stride, const uint8_t* packed, uint8_t* unpacked,
                    int64_t steps, int32_t* sums) {
  constexpr int kChains = R <= 2 ? 4 : 2;
  __m512i sum[R][kChains];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) sum[r][c] = _mm512_setzero_si512();
  }
  for (int64_t t = 0; t < steps; ++t, x += kStep, unpacked += 4 * kStepBytes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      __m512i codes;
      if (First) {
        const __m512i shifted = _mm512_srli_epi16(load512(packed + t * kStepBytes), unsigned(2 * j));
        codes = _mm512_and_si512(shifted, _mm512_set1_epi8(3));
        store512(unpacked + kStepBytes * j, codes);
      } else {
        codes = load512(unpacked + kStepBytes * j);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const __m512i four = broadcast4x16(x + r * stride + 4 * j);
        sum[r][j % kChains] = dot(sum[r][j % kChains], codes, four);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    __m512i all = load512(sums + r * kPanel);
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) all = _mm512_add_epi32(all, sum[r][c]);
    store512(sums + r * kPanel, all);
  }
}

// sum[j] += codes j of a step, masked where they are: code j counts 4^j times, and is shifted
// down at the end, exactly.
inline void gemv_step(const uint8_t* packed, const uint8_t* x, __m512i (&sum)[4]) {
  const __m512i words = load512(packed);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i codes = _mm512_and_si512(words, _mm512_set1_epi8(char(3 << (2 * j))));
    sum[j] = dot(sum[j], codes, broadcast4x16(x + 4 * j));
  }
}

struct Isa : Isa256<int> {  // int: no 256-bit Dot is used here
  static constexpr int64_t kRows = 8;
  static constexpr int64_t kChunkSteps = 32;
  // The sums of code 3 count 64 times, 4 products a step, and are added in one int32.
  static constexpr int64_t kGemvSteps = int64_t{1} << 14;
  static_assert(kGemvSteps * 4 * 2 * 127 * 64 < (int64_t{1} << 31), "sums fit an int32");

  // Rows [1, kRows] as a template argument.
  template <bool First, int R = kRows>
  static void tile(int rows, const uint8_t* x, int64_t stride, const uint8_t* packed,
                   int64_t steps, uint8_t* unpacked, int32_t* sums) {
    if constexpr (R > 1) {
      if (rows < R) return tile<First, R - 1>(rows, x, stride, packed, steps, unpacked, sums);
    }
    tile512<R, First>(x, stride, packed, unpacked, steps, sums);
  }
  static void first_tile(int rows, const uint8_t* x, int64_t stride, const uint8_t* packed,
                         int64_t steps, uint8_t* unpacked, int32_t* sums) {
    tile<true>(rows, x, stride, packed, steps, unpacked, sums);
  }
  static void next_tile(int rows, const uint8_t* x, int64_t stride, uint8_t* unpacked,
                        int64_t steps, int32_t* sums) {
    tile<false>(rows, x, stride, nullptr, steps, unpacked, sums);
  }

  // sums [16] += x [16 * steps] . codes. Even and odd steps have sums of their own, so that no
  // product waits for the one before it.
  static void gemv(const uint8_t* x, const uint8_t* packed, int64_t steps, int32_t* sums) {
    const __m512i zero = _mm512_setzero_si512();
    __m512i even[4] = {zero, zero, zero, zero}, odd[4] = {zero, zero, zero, zero};
    for (int64_t t = 0; t + 1 < steps; t += 2, x += 2 * kStep, packed += 2 * kStepBytes) {
      _mm_prefetch((const char*)packed + 4096, _MM_HINT_T0);
      _mm_prefetch((const char*)packed + 4096 + kStepBytes, _MM_HINT_T0);
      gemv_step(packed, x, even);
      gemv_step(packed + kStepBytes, x + kStep, odd);
    }
    if (steps % 2) gemv_step(packed, x, even);
    alignas(64) int32_t parts[4][kPanel];
    for (int j = 0; j < 4; ++j) store512(parts[j], _mm512_add_epi32(even[j], odd[j]));
    for (int n = 0; n < kPanel; ++n)
      sums[n] += parts[0][n] + (parts[1][n] >> 2) + (parts[2][n] >> 4) + (parts[3][n] >> 6);
  }
};

}  // namespace

const Kernels kAvx512VnniKernels = {"avx512vnni", quantize, to_float, multiply_int8<Isa>,
                                    multiply_float<Isa>};

}  // namespace bitnet_cpu
