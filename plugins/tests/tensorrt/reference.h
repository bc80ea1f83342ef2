// A plain TernaryMatMul for the driver's small shapes: random ternary layers, the packing, fp16
// and the result by the definition. The op's own oracle is the NumPy reference, against which the
// kernels are tested (../kernels); this one only has to notice a plugin that passes them the
// wrong tensor, size or type.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

namespace reference {

inline uint16_t ToHalf(float value) {  // round to nearest even; no overflow in these tests
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const int32_t exponent = static_cast<int32_t>((bits >> 23) & 0xff) - 127 + 15;
  uint32_t mantissa = bits & 0x7fffffu;
  if (exponent <= 0) {  // subnormal or zero
    if (exponent < -10) return static_cast<uint16_t>(sign);
    mantissa |= 0x800000u;
    const uint32_t shift = static_cast<uint32_t>(14 - exponent);
    const uint32_t half_ulp = 1u << (shift - 1);
    const uint32_t rounded = mantissa + half_ulp - 1 + ((mantissa >> shift) & 1);
    return static_cast<uint16_t>(sign | (rounded >> shift));
  }
  const uint32_t packed = (static_cast<uint32_t>(exponent) << 23 | mantissa) +
                          0xfffu + ((mantissa >> 13) & 1);
  return static_cast<uint16_t>(sign | (packed >> 13));
}

inline float FromHalf(uint16_t half) {
  const float sign = (half & 0x8000u) ? -1.0f : 1.0f;
  const int exponent = (half >> 10) & 0x1f;
  const int mantissa = half & 0x3ff;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(mantissa | 0x400), exponent - 25);
}

struct Layer {
  int32_t k = 0;
  int32_t n = 0;
  int32_t group_size = 0;
  int32_t activation_bits = 8;
  bool scale_per_row = true;  // [N], else [1]; with groups [N, K / group_size]
  bool has_bias = true;

  std::vector<int8_t> w;       // [N, K]
  std::vector<uint32_t> packed;  // [N, K'/16]
  std::vector<float> scale;
  std::vector<float> bias;

  int32_t groups() const { return group_size ? k / group_size : 1; }
  int64_t words() const { return (k + 63) / 64 * 4; }

  std::vector<int64_t> scale_sizes() const {
    if (group_size) return {n, groups()};
    return {scale_per_row ? n : 1};
  }

  void Randomize(uint32_t seed) {
    std::mt19937 random(seed);
    std::uniform_int_distribution<int> trit(-1, 1);
    std::uniform_real_distribution<float> real(0.25f, 1.5f);
    w.resize(static_cast<size_t>(n) * k);
    for (int8_t& value : w) value = static_cast<int8_t>(trit(random));
    packed.assign(static_cast<size_t>(n * words()), 0xaaaaaaaau);  // code 2 everywhere
    for (int32_t row = 0; row < n; ++row) {
      for (int32_t i = 0; i < k; ++i) {
        uint32_t& word = packed[static_cast<size_t>(row * words() + i / 16)];
        const uint32_t code = static_cast<uint32_t>(w[static_cast<size_t>(row) * k + i] + 2);
        word = (word & ~(3u << (2 * (i % 16)))) | code << (2 * (i % 16));
      }
    }
    size_t scales = 1;
    for (const int64_t size : scale_sizes()) scales *= static_cast<size_t>(size);
    scale.resize(scales);
    for (float& value : scale) value = real(random);
    bias.resize(has_bias ? static_cast<size_t>(n) : 0);
    for (float& value : bias) value = real(random) - 1.0f;
  }

  float ScaleOf(int32_t row, int32_t group) const {
    if (group_size) return scale[static_cast<size_t>(row) * groups() + group];
    return scale[scale_per_row ? static_cast<size_t>(row) : 0];
  }

  // x [M, K] -> y [M, N]
  std::vector<float> Apply(const std::vector<float>& x) const {
    const size_t rows = x.size() / static_cast<size_t>(k);
    std::vector<float> y(rows * n);
    std::vector<float> left(static_cast<size_t>(k));
    for (size_t m = 0; m < rows; ++m) {
      const float a = Quantize(&x[m * k], left.data());
      for (int32_t row = 0; row < n; ++row) {
        double sum = 0;
        for (int32_t i = 0; i < k; ++i) {
          const float weight = w[static_cast<size_t>(row) * k + i];
          sum += double{left[i]} * weight * ScaleOf(row, group_size ? i / group_size : 0);
        }
        y[m * n + row] = static_cast<float>(sum * a + (has_bias ? bias[row] : 0.0f));
      }
    }
    return y;
  }

 private:
  // left: integers of one row, or the row itself; returns what they are to be multiplied by.
  float Quantize(const float* x, float* left) const {
    if (activation_bits == 0) {
      std::copy(x, x + k, left);
      return 1.0f;
    }
    float s = 1e-5f;
    for (int32_t i = 0; i < k; ++i) s = std::max(s, std::fabs(x[i]));
    const float a = s / 127.0f;
    for (int32_t i = 0; i < k; ++i) {
      left[i] = std::min(127.0f, std::max(-128.0f, std::nearbyint(x[i] / a)));
    }
    return a;
  }
};

}  // namespace reference
