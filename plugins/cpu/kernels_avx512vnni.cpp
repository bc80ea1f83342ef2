// The AVX512-VNNI path: a step of a panel, 16 outputs x 4 codes, is one 512-bit register.
// Activations are quantized, and float activations multiplied, as on the AVX2 path.
#include "blocking.h"
#include "tile256.h"

namespace bitnet_cpu {
namespace {

inline __m512i load512(const void* p) { return _mm512_loadu_si512(p); }
inline void store512(void* p, __m512i v) { _mm512_storeu_si512(p, v); }

// sum + the products of 64 codes with 64 activations. In assembly, for gcc would reorder the sums,
// copy and spill them.
inline __m512i dot(__m512i sum, __m512i codes, __m512i x) {
#if defined(BITNET_CPU_EMULATED)
  return _mm512_dpbusd_epi32(sum, codes, x);
#else
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
  return sum;
#endif
}

inline __m512i broadcast4x16(const uint8_t* p) {
  int32_t four;
  memcpy(&four, p, sizeof four);
  return _mm512_set1_epi32(four);
}

// sums [P, R, 16] += x [R, 16 * steps] . codes of P panels. Two panels share every activation
// that is loaded: with one, the loads would limit the loop. As many sums as a product takes to
// be added, twice (chains), so that none waits for the one before it.
template <int R, int P, bool First>
inline void tile512(const uint8_t* x, int64_t stride, Packed<P> packed, uint8_t* unpacked,
                    int64_t steps, int32_t* sums) {
  constexpr int kChains = R * P <= 4 ? 4 : R * P <= 8 ? 2 : 1;
  __m512i sum[R][P][kChains];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < P * kChains; ++i) sum[r][i / kChains][i % kChains] = _mm512_setzero_si512();
  }
  for (int64_t t = 0; t < steps; ++t, x += kStep) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j, unpacked += P * kStepBytes) {
      __m512i codes[P];
#pragma GCC unroll 2
      for (int i = 0; i < P; ++i) {
        if (First) {
          const __m512i words = load512(packed.panel(i) + t * kStepBytes);
          codes[i] = _mm512_and_si512(_mm512_srli_epi16(words, unsigned(2 * j)),
                                      _mm512_set1_epi8(3));
          store512(unpacked + i * kStepBytes, codes[i]);
        } else {
          codes[i] = load512(unpacked + i * kStepBytes);
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const __m512i four = broadcast4x16(x + r * stride + 4 * j);
#pragma GCC unroll 2
        for (int i = 0; i < P; ++i)
          sum[r][i][j % kChains] = dot(sum[r][i][j % kChains], codes[i], four);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int i = 0; i < P; ++i) {
      int32_t* out = sums + i * kPanelSums + r * kPanel;
      __m512i all = load512(out);
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) all = _mm512_add_epi32(all, sum[r][i][c]);
      store512(out, all);
    }
  }
}

// Rows [1, R] as a template argument.
template <int R, int P, bool First>
inline void tile512_rows(int rows, const uint8_t* x, int64_t stride, Packed<P> packed,
                         uint8_t* unpacked, int64_t steps, int32_t* sums) {
  if constexpr (R > 1) {
    if (rows < R)
      return tile512_rows<R - 1, P, First>(rows, x, stride, packed, unpacked, steps, sums);
  }
  tile512<R, P, First>(x, stride, packed, unpacked, steps, sums);
}

// sum[i][j] += codes j of a step of panel i, masked where they are: code j counts 4^j times, and
// is shifted down at the end, exactly.
template <int P>
inline void gemv_step(Packed<P> packed, int64_t offset, const uint8_t* x, __m512i (&sum)[P][4]) {
  __m512i words[P];
#pragma GCC unroll 2
  for (int i = 0; i < P; ++i) {
    _mm_prefetch((const char*)packed.panel(i) + offset + 4096, _MM_HINT_T0);
    words[i] = load512(packed.panel(i) + offset);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i four = broadcast4x16(x + 4 * j);
#pragma GCC unroll 2
    for (int i = 0; i < P; ++i) {
      const __m512i codes = _mm512_and_si512(words[i], _mm512_set1_epi8(char(3 << (2 * j))));
      sum[i][j] = dot(sum[i][j], codes, four);
    }
  }
}

struct Isa : Float256 {
  static constexpr int64_t kRows = 8;
  static constexpr bool kEvenTiles = true;
  static constexpr int64_t kTilePanels = 2;
  // 12 KB of codes of two panels and 12 KB of activations: the smallest L1 cache is 32 KB.
  static constexpr int64_t kChunkSteps = 24;
  // The sums of code 3 count 64 times, 4 products a step, and are added in one int32.
  static constexpr int64_t kGemvSteps = int64_t{1} << 14;
  static_assert(kGemvSteps * 4 * 2 * 127 * 64 < (int64_t{1} << 31), "sums fit an int32");

  template <bool First, int P>
  static void products(int rows, const uint8_t* x, int64_t stride, Packed<P> packed,
                       int64_t steps, uint8_t* unpacked, int32_t* sums) {
    tile512_rows<kRows, P, First>(rows, x, stride, packed, unpacked, steps, sums);
  }

  // sums [P, 16] += x [16 * steps] . codes. Even and odd steps have sums of their own, so that no
  // product waits for the one before it.
  template <int P>
  static void gemv(const uint8_t* x, Packed<P> packed, int64_t steps, int32_t* sums) {
    __m512i even[P][4], odd[P][4];
    for (int i = 0; i < 4 * P; ++i) even[i / 4][i % 4] = odd[i / 4][i % 4] = _mm512_setzero_si512();
    int64_t t = 0;
    for (; t + 1 < steps; t += 2, x += 2 * kStep) {
      gemv_step<P>(packed, t * kStepBytes, x, even);
      gemv_step<P>(packed, (t + 1) * kStepBytes, x + kStep, odd);
    }
    if (t < steps) gemv_step<P>(packed, t * kStepBytes, x, even);
    for (int i = 0; i < P; ++i) {
      alignas(64) int32_t parts[4][kPanel];
      for (int j = 0; j < 4; ++j) store512(parts[j], _mm512_add_epi32(even[i][j], odd[i][j]));
      for (int n = 0; n < kPanel; ++n)
        sums[i * kPanelSums + n] +=
            parts[0][n] + (parts[1][n] >> 2) + (parts[2][n] >> 4) + (parts[3][n] >> 6);
    }
  }
};

}  // namespace

const Kernels kAvx512VnniKernels = {"avx512vnni", quantize, to_float, multiply_int8<Isa>,
                                    multiply_float<Isa>};

}  // namespace bitnet_cpu
