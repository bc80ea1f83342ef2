// A ternary layer with random contents, and its product computed the slow way from the definition
// in bitnet_export/op.py. Shares nothing with the library but half.h's conversions, which
// test_cpu.cpp checks on their own.
#ifndef BITNET_TESTS_CPU_REFERENCE_H_
#define BITNET_TESTS_CPU_REFERENCE_H_

#include <cstdint>
#include <random>
#include <vector>

#include "bitnet_cpu.h"

namespace reference {

struct Case {
  int64_t M, K, N;
  int64_t group_size = 0;
  int64_t activation_bits = 8;
  bool channel_scale = false;
  bool bias = true;
  bool half = false;
};

struct Layer {
  Case shape;
  std::vector<int8_t> trits;  // [N, K]
  std::vector<uint8_t> packed;
  std::vector<float> scale, bias;
  bitnet_cpu_layer view() const;
};

// Weights drawn from {-1, 0, 1}, or all `constant` where it is not 2.
Layer make_layer(const Case& shape, std::mt19937& random, int constant = 2);

// x [M, K] normal with some zeros; row 0 has ties, row 1 what is nearly one.
std::vector<float> make_activations(const Case& shape, std::mt19937& random);

// y [M, N] in float32, before any conversion to half.
std::vector<float> multiply(const Layer& layer, const std::vector<float>& x);

}  // namespace reference

#endif  // BITNET_TESTS_CPU_REFERENCE_H_
