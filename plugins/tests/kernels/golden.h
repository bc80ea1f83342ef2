// Reads the golden data of tools/make_golden.py, which says what the format is.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "ternary_matmul.h"

struct GoldenCase {
  bitnet::TernaryMatMulShape shape;
  bitnet::DType type = bitnet::DType::kFloat32;
  std::vector<unsigned char> x;         // [m, k]
  std::vector<uint32_t> packed_weight;  // [n, K'/16]
  std::vector<float> scale, bias;       // [scale_count], [n] or empty
  std::vector<unsigned char> y;         // [m, n] of the reference
  std::vector<float> tolerance;         // [m, n]

  size_t ElementBytes() const { return type == bitnet::DType::kFloat16 ? 2 : 4; }
  std::string Name() const {
    char text[160];
    std::snprintf(text, sizeof text, "m=%d k=%d n=%d group=%d bits=%d scales=%d %s%s", shape.m,
                  shape.k, shape.n, shape.group_size, shape.activation_bits, shape.scale_count,
                  ElementBytes() == 2 ? "fp16" : "fp32", bias.empty() ? " no bias" : "");
    return text;
  }
};

namespace golden_detail {

template <class T>
std::vector<T> ReadArray(std::ifstream& file, size_t count) {
  std::vector<T> values(count);
  file.read(reinterpret_cast<char*>(values.data()),
            static_cast<std::streamsize>(count * sizeof(T)));
  if (!file) throw std::runtime_error("golden file is cut short");
  return values;
}

inline GoldenCase ReadCase(std::ifstream& file) {
  const auto h = ReadArray<int32_t>(file, 10);
  GoldenCase c;
  c.shape = {h[0], h[1], h[2], h[3], h[4], h[5]};
  c.type = h[7] ? bitnet::DType::kFloat16 : bitnet::DType::kFloat32;
  const size_t m = static_cast<size_t>(h[0]), k = static_cast<size_t>(h[1]),
               n = static_cast<size_t>(h[2]);
  c.x = ReadArray<unsigned char>(file, m * k * c.ElementBytes());
  c.packed_weight = ReadArray<uint32_t>(file, static_cast<size_t>(h[8]));
  c.scale = ReadArray<float>(file, static_cast<size_t>(h[5]));
  if (h[6]) c.bias = ReadArray<float>(file, n);
  c.y = ReadArray<unsigned char>(file, m * n * c.ElementBytes());
  c.tolerance = ReadArray<float>(file, m * n);
  return c;
}

}  // namespace golden_detail

inline std::vector<GoldenCase> ReadGolden(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  const auto magic = golden_detail::ReadArray<char>(file, 8);
  if (std::memcmp(magic.data(), "BNGOLD1", 8) != 0)
    throw std::runtime_error(path + ": not golden data");
  const int32_t count = golden_detail::ReadArray<int32_t>(file, 1)[0];
  std::vector<GoldenCase> cases;
  for (int32_t i = 0; i < count; ++i) cases.push_back(golden_detail::ReadCase(file));
  if (cases.empty()) throw std::runtime_error(path + ": no cases");
  return cases;
}
