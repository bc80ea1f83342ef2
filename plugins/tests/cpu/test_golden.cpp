// The CPU library on golden data: inputs and answers written by the NumPy reference
// (tools/make_golden.py, which describes the format and where a tolerance comes from).
//
//   test_golden FILE PATH      PATH: the instruction path; exit code 77 where it cannot run
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <vector>

#include "bitnet_cpu.h"
#include "half.h"

namespace {

template <class T>
std::vector<T> read(std::ifstream& file, int64_t count) {
  std::vector<T> values(static_cast<size_t>(count));
  file.read(reinterpret_cast<char*>(values.data()), std::streamsize(values.size() * sizeof(T)));
  if (file) return values;
  std::printf("the golden file is cut short\n");
  std::exit(2);
}

struct Case {
  int64_t m, k, n;
  bool half;
  std::vector<uint8_t> x, y;
  std::vector<uint32_t> packed;
  std::vector<float> scale, bias, tolerance;
  bitnet_cpu_layer layer;

  explicit Case(std::ifstream& file) {
    const auto head = read<int32_t>(file, 10);
    m = head[0], k = head[1], n = head[2], half = head[7];
    const int64_t element = half ? 2 : 4;
    x = read<uint8_t>(file, m * k * element);
    packed = read<uint32_t>(file, head[8]);
    scale = read<float>(file, head[5]);
    bias = read<float>(file, head[6] ? n : 0);
    y = read<uint8_t>(file, m * n * element);
    tolerance = read<float>(file, m * n);
    layer = {k, n, head[3], head[4], reinterpret_cast<const uint8_t*>(packed.data()),
             packed.size() * 4, scale.data(), scale.size(), bias.empty() ? nullptr : bias.data()};
  }
};

float at(const std::vector<uint8_t>& values, size_t i, bool half) {
  if (half) {
    uint16_t h;
    std::memcpy(&h, values.data() + i * 2, sizeof h);
    return bitnet_cpu::half_to_float(h);
  }
  float f;
  std::memcpy(&f, values.data() + i * 4, sizeof f);
  return f;
}

// How many of a case's results are wrong; negative: a status.
int run(const Case& c) {
  const auto type = c.half ? BITNET_CPU_FLOAT16 : BITNET_CPU_FLOAT32;
  bitnet_cpu_weights* w = nullptr;
  const bitnet_cpu_status status = bitnet_cpu_create(&c.layer, &w);
  if (status != BITNET_CPU_OK) return -int(status);
  std::vector<char> workspace(bitnet_cpu_workspace_bytes(w, c.m));
  std::vector<uint8_t> y(c.y.size());
  int wrong = 0;
  wrong += bitnet_cpu_prepare(w, c.x.data(), type, c.m, 0, c.m, workspace.data()) != 0;
  wrong += bitnet_cpu_multiply(w, workspace.data(), c.m, 0, c.m, 0, bitnet_cpu_panels(w), y.data(),
                               type) != 0;
  bitnet_cpu_destroy(w);
  for (size_t i = 0; i < c.tolerance.size(); ++i) {
    const float got = at(y, i, c.half), want = at(c.y, i, c.half);
    const bool near = std::isfinite(want) && std::fabs(got - want) <= c.tolerance[i];
    const bool same = std::isnan(want) ? std::isnan(got) : got == want || near;
    wrong += !same;
  }
  return wrong;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return std::printf("usage: %s FILE PATH\n", argv[0]), 2;
  setenv("BITNET_CPU_PATH", argv[2], 1);
  std::ifstream file(argv[1], std::ios::binary);
  const auto magic = read<char>(file, 8);
  if (std::memcmp(magic.data(), "BNGOLD1", 8)) return std::printf("not golden data\n"), 2;
  const int count = read<int32_t>(file, 1)[0];
  int failed = 0;
  for (int i = 0; i < count; ++i) {
    const Case c(file);
    const int wrong = run(c);
    if (wrong == -BITNET_CPU_UNSUPPORTED_PATH) return 77;
    if (!wrong) continue;
    ++failed;
    std::printf("case %d: M=%d K=%d N=%d group=%d bits=%d half=%d: %d\n", i, int(c.m), int(c.k),
                int(c.n), int(c.layer.group_size), int(c.layer.activation_bits), c.half, wrong);
  }
  std::printf("%s: %d of %d golden cases failed\n", argv[2], failed, count);
  return failed || !count ? 1 : 0;
}
