// What the x86 paths share, in 256-bit AVX2, FMA and F16C: quantizing activations, the float
// product, and the int8 tile, whose one step (a Dot) is what AVX2 and AVX-VNNI do differently.
// Internal linkage throughout, for the reason half.h gives.
#ifndef BITNET_CPU_VECTOR256_H_
#define BITNET_CPU_VECTOR256_H_

#if defined(BITNET_CPU_EMULATED)
#include "simde_intrinsics.h"
#else
#include <immintrin.h>
#endif

#include <string.h>

#include "internal.h"

namespace bitnet_cpu {
namespace {

inline __m256i load256(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline void store256(void* p, __m256i v) { _mm256_storeu_si256((__m256i*)p, v); }

// Keeps the compiler from reordering a chain of additions. gcc otherwise adds the products of
// several quarter steps among themselves first, runs out of registers and halves the speed.
inline __m256i pinned(__m256i v) {
#if !defined(BITNET_CPU_EMULATED)
  __asm__("" : "+x"(v));
#endif
  return v;
}

// Four activations of a row, against four codes of each of 8 outputs.
inline __m256i broadcast4(const uint8_t* p) {
  int32_t four;
  memcpy(&four, p, sizeof four);
  return _mm256_set1_epi32(four);
}

// Codes j of 8 words as bytes, scaled by 1.
template <int J>
inline __m256i codes(__m256i words) {
  const __m256i shifted = J ? _mm256_srli_epi16(words, 2 * J) : words;
  return _mm256_and_si256(shifted, _mm256_set1_epi8(3));
}

inline int32_t sum8(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

inline void store_half16(const float* values, uint16_t* half) {
  for (int i = 0; i < 16; i += 8) {
    const __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128((__m128i*)(half + i), h);
  }
}

// ---- activations ----

// Inputs [i, i + 8) of a row, of which only those below n are read; the others are 0.
template <bool Half>
inline __m256 load8(const void* x, int64_t i, int64_t n) {
  if (i + 8 <= n) {
    if (Half) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)((const uint16_t*)x + i)));
    return _mm256_loadu_ps((const float*)x + i);
  }
  alignas(32) uint8_t padded[32] = {0};
  const size_t element = Half ? 2 : 4;
  if (i < n) memcpy(padded, (const uint8_t*)x + i * element, size_t(n - i) * element);
  if (Half) return _mm256_cvtph_ps(_mm_load_si128((const __m128i*)padded));
  return _mm256_load_ps((const float*)padded);
}

// The bits of max |x|. Compared as integers, so that NaN is the largest and is never lost.
template <bool Half>
inline uint32_t absmax_bits(const void* x, int64_t n) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i most = _mm256_setzero_si256(), most2 = most;
  for (int64_t i = 0; i < n; i += 16) {
    const __m256i v = _mm256_castps_si256(load8<Half>(x, i, n));
    const __m256i v2 = _mm256_castps_si256(load8<Half>(x, i + 8, n));
    most = _mm256_max_epi32(most, _mm256_and_si256(v, magnitude));
    most2 = _mm256_max_epi32(most2, _mm256_and_si256(v2, magnitude));
  }
  alignas(32) uint32_t lanes[8];
  _mm256_store_si256((__m256i*)lanes, _mm256_max_epi32(most, most2));
  uint32_t bits = 0;
  for (uint32_t lane : lanes) bits = lane > bits ? lane : bits;
  return bits;
}

struct RowScale {
  __m256 a, reciprocal;
};

// *q = round_half_even(x / a), |x / a| <= 127, for a step of 16. x * (1 / a) and the rounded
// quotient differ by less than 127 * 1.5 * 2^-23 < 3e-5: unless one of the 16 comes that close
// to a half they round alike, and 16 divisions are saved.
inline void quantize16(const __m256 (&x)[2], const RowScale& s, __m256i (&q)[2]) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  __m256 off[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256 product = _mm256_mul_ps(x[i], s.reciprocal);
    q[i] = _mm256_cvtps_epi32(product);  // to nearest, ties to even: the default mode
    off[i] = _mm256_and_ps(_mm256_sub_ps(product, _mm256_cvtepi32_ps(q[i])), magnitude);
  }
  const __m256 most = _mm256_max_ps(off[0], off[1]);
  const __m256 close = _mm256_cmp_ps(most, _mm256_set1_ps(0.5f - 3e-5f), _CMP_GT_OQ);
  if (__builtin_expect(_mm256_movemask_ps(close), 0)) {
    q[0] = _mm256_cvtps_epi32(_mm256_div_ps(x[0], s.a));
    q[1] = _mm256_cvtps_epi32(_mm256_div_ps(x[1], s.a));
  }
}

// A step of 16 int32 in [-127, 127] -> bytes in the kernels' order: byte 4j + b is input 4b + j.
inline __m128i order_step(__m256i first, __m256i second) {
  const __m256i words = _mm256_packs_epi32(first, second);  // 0-3, 8-11 | 4-7, 12-15
  const __m256i bytes = _mm256_packs_epi16(words, words);
  const __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
  const __m128i order = _mm_setr_epi8(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15);
  return _mm_shuffle_epi8(_mm_unpacklo_epi64(low, high), order);
}

template <bool Half>
inline void quantize_row(const bitnet_cpu_weights& w, const Workspace& ws, int64_t row,
                         const uint8_t* x) {
  int8_t* out = (int8_t*)(ws.x + row * ws.row_bytes);
  int32_t* sums = ws.sums + row * w.groups;
  const uint32_t bits = absmax_bits<Half>(x, w.K);
  float most;
  memcpy(&most, &bits, sizeof most);
  if (bits >= 0x7f800000u) {  // an infinity or NaN in the row: 0 * NaN makes all of it NaN
    ws.a[row] = __builtin_nanf("");
    memset(out, 0, size_t(w.steps() * kStep));
    memset(sums, 0, size_t(w.groups) * sizeof(int32_t));
    return;
  }
  const float a = (most > kAbsmaxFloor ? most : kAbsmaxFloor) / kInt8Max;
  ws.a[row] = a;
  const RowScale s{_mm256_set1_ps(a), _mm256_set1_ps(1.0f / a)};
  for (int64_t g = 0; g < w.groups; ++g) {
    const uint8_t* group = x + g * w.group_inputs * (Half ? 2 : 4);
    __m256i sum = _mm256_setzero_si256();
    for (int64_t k = 0; k < w.group_inputs; k += kStep, out += kStep) {
      const __m256 inputs[2] = {load8<Half>(group, k, w.group_inputs),
                                load8<Half>(group, k + 8, w.group_inputs)};
      __m256i q[2];
      quantize16(inputs, s, q);
      sum = _mm256_add_epi32(sum, _mm256_add_epi32(q[0], q[1]));
      _mm_storeu_si128((__m128i*)out, order_step(q[0], q[1]));
    }
    sums[g] = sum8(sum);
  }
}

inline void quantize(const bitnet_cpu_weights& w, const Workspace& ws, const void* x, bool half,
                     int64_t row_begin, int64_t row_end) {
  for (int64_t r = row_begin; r < row_end; ++r) {
    const uint8_t* row = (const uint8_t*)x + r * w.K * (half ? 2 : 4);
    if (half)
      quantize_row<true>(w, ws, r, row);
    else
      quantize_row<false>(w, ws, r, row);
  }
}

template <bool Half>
inline void row_to_float(const bitnet_cpu_weights& w, const uint8_t* x, float* out) {
  for (int64_t g = 0; g < w.groups; ++g) {
    const uint8_t* group = x + g * w.group_inputs * (Half ? 2 : 4);
    for (int64_t k = 0; k < w.group_steps * kStep; k += 8, out += 8)
      _mm256_storeu_ps(out, load8<Half>(group, k, w.group_inputs));
  }
}

inline void to_float(const bitnet_cpu_weights& w, const Workspace& ws, const void* x, bool half,
                     int64_t row_begin, int64_t row_end) {
  for (int64_t r = row_begin; r < row_end; ++r) {
    const uint8_t* row = (const uint8_t*)x + r * w.K * (half ? 2 : 4);
    float* out = (float*)(ws.x + r * ws.row_bytes);
    if (half)
      row_to_float<true>(w, row, out);
    else
      row_to_float<false>(w, row, out);
  }
}

}  // namespace
}  // namespace bitnet_cpu

#endif  // BITNET_CPU_VECTOR256_H_
