// Reading activations and turning a row into int8, shared by every kernel that needs it.
//
// Sixteen consecutive activations k = 0..15 become one uint4 whose component i holds, byte by
// byte, elements {i, 4+i, 8+i, 12+i}: the order in which `word & (0x03030303 << 2i)` picks
// weights out of a packed word, so that weights need no rearranging.
#pragma once

#include "device_ops.cuh"
#include "params.h"

namespace bitnet {

__device__ __forceinline__ float ToFloat(float v) { return v; }
__device__ __forceinline__ float ToFloat(__half v) { return __half2float(v); }
__device__ __forceinline__ void Store(float* address, float v) { *address = v; }
__device__ __forceinline__ void Store(__half* address, float v) { *address = __float2half_rn(v); }

__device__ __forceinline__ uint32_t Component(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// v = row[begin .. begin + 15], zero past k. aligned: rows start at multiples of 16 bytes.
template <class T>
__device__ __forceinline__ void Load16(const T* row, int begin, int k, bool aligned,
                                       float (&v)[16]) {
  constexpr int kPerVector = 16 / sizeof(T);
  if (aligned && begin + 16 <= k) {
#pragma unroll
    for (int j = 0; j < 16; j += kPerVector) {
      const uint4 raw = *reinterpret_cast<const uint4*>(row + begin + j);
      const T* elements = reinterpret_cast<const T*>(&raw);
#pragma unroll
      for (int e = 0; e < kPerVector; ++e) v[j + e] = ToFloat(elements[e]);
    }
  } else {
    // Not for speed: the exporter pads K, and a whole row takes this path or only its last 16.
#pragma unroll
    for (int j = 0; j < 16; ++j) v[j] = begin + j < k ? ToFloat(row[begin + j]) : 0.0f;
  }
}

// The larger of `bits` and the magnitudes of v, as float bits. Non-negative floats compare like
// their bits, and NaN is the largest of all: unlike fmaxf, this keeps it.
__device__ __forceinline__ uint32_t MaxMagnitude(const float (&v)[16], uint32_t bits) {
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const uint32_t magnitude = __float_as_uint(v[j]) & 0x7fffffffu;
    bits = magnitude > bits ? magnitude : bits;
  }
  return bits;
}

__device__ __forceinline__ uint32_t WarpMax(uint32_t v) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, v, lanes);
    v = other > v ? other : v;
  }
  return v;
}

__device__ __forceinline__ int32_t WarpSum(int32_t v) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(0xffffffffu, v, lanes);
  return v;
}

// a = max(absmax, 1e-5) / 127, the value of one int8 step.
__device__ __forceinline__ float RowScale(uint32_t absmax_bits) {
  const uint32_t floor_bits = 0x3727c5acu;  // 1e-5f
  const uint32_t s = absmax_bits > floor_bits ? absmax_bits : floor_bits;
  return __fdiv_rn(__uint_as_float(s), 127.0f);
}

// v / a as int8 in interleaved order: round_half_even of the fp32 quotient, as the op defines it.
//
// A true division and a conversion for each element would dominate a small kernel. Instead
// x * (1/a) + 1.5 * 2^23 rounds to an integer in the low mantissa bits. x * (1/a) is within
// 2.3e-5 of the quotient (three roundings of at most 127), so only near a tie can the division
// say otherwise; then all sixteen are divided, and likewise where a is infinite or NaN (the int8
// is then 0, and the row scale carries the NaN into y). No clamp: |x| <= s makes the quotient at
// most 127.
__device__ __forceinline__ uint4 Quantize16(const float (&v)[16], float a, float inverse_a) {
  const float shifter = 12582912.0f;
  uint32_t q[16];
  bool sure = true;
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const float estimate = v[j] * inverse_a;
    const float shifted = estimate + shifter;
    q[j] = __float_as_uint(shifted);
    sure = sure && fabsf(estimate - (shifted - shifter)) <= 0.4999f;
  }
  if (!sure) {
#pragma unroll
    for (int j = 0; j < 16; ++j)
      q[j] = static_cast<uint32_t>(__float2int_rn(rintf(__fdiv_rn(v[j], a))));
  }
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = (q[i] & 255u) | (q[4 + i] & 255u) << 8 | (q[8 + i] & 255u) << 16 | q[12 + i] << 24;
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ int32_t SumInt8(const uint4& v) {
  int32_t sum = Dp4a(0x01010101u, v.x, 0);
  sum = Dp4a(0x01010101u, v.y, sum);
  sum = Dp4a(0x01010101u, v.z, sum);
  return Dp4a(0x01010101u, v.w, sum);
}

// The trits k and 8 + k (k < 8) of a word of 16 codes, as two halves. One mask finds both codes,
// which become the low mantissa bits of 1024: code * 4^i above it. One multiply-add of halves
// takes both down to code - 2; every step is exact.
__device__ __forceinline__ uint32_t TritPair(uint32_t word, int k) {
  const int i = k % 4;
  const float quarter = 1.0f / (1 << (2 * i));  // 4^-i
  const uint32_t codes = MaskOr(word >> (k / 4 * 8), 0x00030003u << (2 * i), 0x64006400u);
  return HalfFma2(codes, quarter, -(1024.0f * quarter + 2.0f));
}

}  // namespace bitnet
