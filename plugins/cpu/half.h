// float16 <-> float32 in plain integer arithmetic, for the portable path. The vector paths use
// the processor's own conversions (F16C, NEON). Everything here has internal linkage, so that no
// file compiled for a newer processor lends its copy to one that is not.
#ifndef BITNET_CPU_HALF_H_
#define BITNET_CPU_HALF_H_

#include <stdint.h>
#include <string.h>

namespace bitnet_cpu {
namespace {

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 31u, fraction = h & 1023u;
  float value;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24, exact
    value = float(fraction) * 5.9604644775390625e-8f;
  } else {
    const uint32_t e = exponent == 31 ? 255u : exponent + 112u;
    const uint32_t bits = e << 23 | fraction << 13;
    memcpy(&value, &bits, sizeof value);
  }
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  bits |= sign;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Rounds to nearest, ties to even; overflows to infinity; NaN stays NaN.
inline uint16_t float_to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and more
  uint32_t mantissa, shift;
  if (bits < 0x38800000u) {  // below 2^-14: a subnormal half
    if (bits < 0x33000000u) return sign;  // below 2^-25
    mantissa = (bits & 0x7fffffu) | 0x800000u;
    shift = 126u - (bits >> 23);
  } else {
    mantissa = bits - 0x38000000u;  // rebias the exponent from 127 to 15
    shift = 13;
  }
  const uint32_t half = 1u << (shift - 1), rest = mantissa & ((1u << shift) - 1u);
  uint32_t rounded = mantissa >> shift;
  if (rest > half || (rest == half && (rounded & 1u))) ++rounded;
  return uint16_t(sign | rounded);
}

}  // namespace
}  // namespace bitnet_cpu

#endif  // BITNET_CPU_HALF_H_
