// Tests of the CPU library through its C interface, on the instruction path named by argv[1].
// Integers must be exact, so with int8 activations Y must equal the reference bit for bit; with
// float activations only the order of additions differs. Exit code 77: the path cannot run here.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "half.h"
#include "reference.h"

using reference::Case;
using reference::Layer;

namespace {

int failures = 0;

#define CHECK(condition, ...)                                         \
  do {                                                                \
    if (!(condition) && ++failures <= 20) {                           \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);     \
      std::printf(__VA_ARGS__);                                       \
      std::printf("\n");                                              \
    }                                                                 \
  } while (0)

std::string describe(const Case& c) {
  char text[160];
  std::snprintf(text, sizeof text, "M=%d K=%d N=%d group=%d bits=%d channel=%d bias=%d half=%d",
                int(c.M), int(c.K), int(c.N), int(c.group_size), int(c.activation_bits),
                c.channel_scale, c.bias, c.half);
  return text;
}

struct Weights {
  explicit Weights(const bitnet_cpu_layer& layer) { status = bitnet_cpu_create(&layer, &handle); }
  ~Weights() { bitnet_cpu_destroy(handle); }
  Weights(const Weights&) = delete;
  bitnet_cpu_weights* handle = nullptr;
  bitnet_cpu_status status;
};

std::vector<uint16_t> to_half(const std::vector<float>& values) {
  std::vector<uint16_t> out;
  for (float v : values) out.push_back(bitnet_cpu::float_to_half(v));
  return out;
}

std::vector<float> from_half(const std::vector<uint16_t>& values) {
  std::vector<float> out;
  for (uint16_t v : values) out.push_back(bitnet_cpu::half_to_float(v));
  return out;
}

// Runs a whole product in rectangles of `rows` x `panels`, as threads would.
template <class T>
std::vector<T> run(const bitnet_cpu_weights* w, const Case& c, const std::vector<T>& x,
                   int64_t rows, int64_t panels) {
  const auto type = sizeof(T) == 2 ? BITNET_CPU_FLOAT16 : BITNET_CPU_FLOAT32;
  std::vector<T> y(size_t(c.M * c.N));
  std::vector<char> workspace(bitnet_cpu_workspace_bytes(w, c.M));
  for (int64_t m = 0; m < c.M; m += rows) {
    const int64_t end = std::min(m + rows, c.M);
    CHECK(!bitnet_cpu_prepare(w, x.data(), type, c.M, m, end, workspace.data()), "prepare");
    for (int64_t p = 0; p < bitnet_cpu_panels(w); p += panels) {
      const int64_t last = std::min(p + panels, bitnet_cpu_panels(w));
      CHECK(!bitnet_cpu_multiply(w, workspace.data(), c.M, m, end, p, last, y.data(), type),
            "multiply");
    }
  }
  return y;
}

bool same(float got, float want, const Case& c, float magnitude) {
  if (std::isnan(want)) return std::isnan(got);
  if (c.activation_bits) return got == want;
  // Float sums of K terms in another order, each of them within `magnitude`.
  const float tolerance = 1e-6f * magnitude * (1.0f + std::sqrt(float(c.K)));
  return std::fabs(got - want) <= tolerance + (c.half ? std::fabs(want) * 2e-3f : 0.0f);
}

void compare(const Case& c, const std::vector<float>& got, std::vector<float> want,
             float magnitude) {
  if (c.half) want = from_half(to_half(want));
  int bad = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    if (same(got[i], want[i], c, magnitude) || bad++) continue;
    CHECK(false, "%s: y[%zu] = %.9g, want %.9g", describe(c).c_str(), i, double(got[i]),
          double(want[i]));
  }
}

std::vector<float> product(const Layer& layer, const std::vector<float>& x, int64_t rows,
                           int64_t panels) {
  const Case& c = layer.shape;
  const Weights w(layer.view());
  CHECK(w.status == BITNET_CPU_OK, "%s: %s", describe(c).c_str(),
        bitnet_cpu_status_string(w.status));
  if (w.status) return std::vector<float>(size_t(c.M * c.N));
  if (!c.half) return run(w.handle, c, x, rows, panels);
  return from_half(run(w.handle, c, to_half(x), rows, panels));
}

void check_case(const Case& c, std::mt19937& random, int64_t rows = 1000, int64_t panels = 1000) {
  const Layer layer = reference::make_layer(c, random);
  auto x = reference::make_activations(c, random);
  if (c.half) x = from_half(to_half(x));
  float magnitude = 1.0f;
  for (float v : x) magnitude = std::fmax(magnitude, std::fabs(v));
  compare(c, product(layer, x, rows, panels), reference::multiply(layer, x), magnitude);
}

// Every size at least once with every other; formats take turns.
void test_shapes(std::mt19937& random) {
  int turn = 0;
  for (int64_t K : {1, 5, 16, 63, 64, 65, 100, 257, 384, 1536}) {
    for (int64_t N : {1, 3, 15, 16, 17, 63, 64, 65, 384}) {
      for (int64_t M : {1, 2, 3, 4, 5, 8, 13, 17, 33}) {
        if (M * N * K > 3000000) continue;
        Case c{M, K, N};
        c.activation_bits = turn % 4 == 3 ? 0 : 8;
        c.channel_scale = turn % 2;
        c.bias = turn % 3;
        c.half = turn % 5 == 4;
        check_case(c, random);
        ++turn;
      }
    }
  }
}

void test_groups(std::mt19937& random) {
  for (int64_t bits : {8, 0}) {
    for (auto [K, group] : {std::pair<int64_t, int64_t>{6, 1}, {15, 5}, {15, 15}, {96, 48},
                            {128, 64}, {100, 50}, {384, 128}, {1024, 512}}) {
      for (int64_t M : {1, 2, 7, 33}) {
        Case c{M, K, M == 2 ? 35 : 19, group, bits};  // an odd and an even number of panels
        c.half = M == 7;
        check_case(c, random);
      }
    }
  }
}

void test_rectangles(std::mt19937& random) {
  for (int64_t bits : {8, 0}) {
    for (int64_t rows : {1, 4, 9}) {
      for (int64_t panels : {1, 2}) check_case(Case{21, 130, 70, 0, bits}, random, rows, panels);
    }
  }
}

// Sums as large as they get: an int16 that saturates, or an int32 that wraps, shows here.
void test_extremes(std::mt19937& random) {
  for (int w : {-1, 1}) {
    for (int64_t M : {1, 2, 5, 12, 33}) {
      const Case c{M, 4096 + 48, 17};
      const Layer layer = reference::make_layer(c, random, w);
      std::vector<float> x(size_t(c.M * c.K), 3.0f);
      for (size_t i = 0; i < x.size(); ++i) x[i] = (i / size_t(c.K)) % 2 ? -3.0f : 3.0f;
      compare(c, product(layer, x, 1000, 1000), reference::multiply(layer, x), 3.0f);
    }
  }
  const Case deep{2, 400000, 18};
  const Layer layer = reference::make_layer(deep, random, 1);
  const std::vector<float> x(size_t(deep.M * deep.K), 1.0f);
  for (int64_t rows : {1, 2})
    compare(deep, product(layer, x, rows, 1000), reference::multiply(layer, x), 1.0f);
}

void test_not_finite(std::mt19937& random) {
  for (int64_t bits : {8, 0}) {
    for (float poison : {NAN, INFINITY, -INFINITY}) {
      const Case c{3, 70, 18, 0, bits};
      const Layer layer = reference::make_layer(c, random, 0);
      auto x = reference::make_activations(c, random);
      x[size_t(c.K + 66)] = poison;
      const auto y = product(layer, x, 1000, 1000);
      for (int64_t i = 0; i < c.M * c.N; ++i) {
        const bool poisoned = i / c.N == 1;
        CHECK(std::isnan(y[size_t(i)]) == poisoned, "bits=%d y[%d] = %g", int(bits), int(i),
              double(y[size_t(i)]));
      }
    }
  }
}

// Rows far below the floor of absmax, and rows of subnormal numbers, are zeros after rounding.
void test_tiny(std::mt19937& random) {
  const Case c{4, 65, 18};
  const Layer layer = reference::make_layer(c, random);
  std::vector<float> x(size_t(c.M * c.K));
  const float values[] = {0.0f, 1e-40f, 3e-6f, 1e38f};
  for (size_t i = 0; i < x.size(); ++i) x[i] = values[i / size_t(c.K)] * (i % 3 ? 1.0f : -0.7f);
  compare(c, product(layer, x, 1000, 1000), reference::multiply(layer, x), 1.0f);
}

void expect(bitnet_cpu_layer layer, bitnet_cpu_status status, const char* what) {
  const Weights w(layer);
  CHECK(w.status == status, "%s: status %d, want %d", what, int(w.status), int(status));
  CHECK((w.handle != nullptr) == (status == BITNET_CPU_OK), "%s: handle", what);
}

void test_refusals(std::mt19937& random, const char* path) {
  Layer layer = reference::make_layer(Case{1, 70, 18}, random);
  const auto with = [&](auto change) {
    bitnet_cpu_layer view = layer.view();
    change(view);
    return view;
  };
  expect(layer.view(), BITNET_CPU_OK, "a good layer");
  expect(with([](auto& l) { l.K = 0; }), BITNET_CPU_INVALID_ARGUMENT, "K = 0");
  expect(with([](auto& l) { l.N = -1; }), BITNET_CPU_INVALID_ARGUMENT, "N = -1");
  expect(with([](auto& l) { l.K = INT64_MAX; }), BITNET_CPU_INVALID_ARGUMENT, "K huge");
  expect(with([](auto& l) { l.K = 1 << 23; }), BITNET_CPU_BAD_SHAPE, "the largest K");
  expect(with([](auto& l) { l.K = (1 << 23) + 1; }), BITNET_CPU_INVALID_ARGUMENT, "sums overflow");
  expect(with([](auto& l) { l.group_size = 4; }), BITNET_CPU_INVALID_ARGUMENT, "group of 4");
  expect(with([](auto& l) { l.group_size = -7; }), BITNET_CPU_INVALID_ARGUMENT, "group of -7");
  expect(with([](auto& l) { l.activation_bits = 4; }), BITNET_CPU_INVALID_ARGUMENT, "bits");
  expect(with([](auto& l) { l.scale = nullptr; }), BITNET_CPU_INVALID_ARGUMENT, "no scale");
  expect(with([](auto& l) { l.scale_count = 17; }), BITNET_CPU_BAD_SHAPE, "scale of 17");
  expect(with([](auto& l) { l.group_size = 35; }), BITNET_CPU_BAD_SHAPE, "scale of 1, 2 groups");
  expect(with([](auto& l) { --l.packed_weight_bytes; }), BITNET_CPU_BAD_SHAPE, "short weights");
  layer.packed[32 * 17 + 17] = 0xf3;  // the last row's 70th code
  expect(layer.view(), BITNET_CPU_CORRUPT_WEIGHTS, "a code 0");
  layer.packed[32 * 17 + 17] = 0x0a;  // its padding does not matter
  expect(layer.view(), BITNET_CPU_OK, "zeros in the padding");

  setenv("BITNET_CPU_PATH", "sse9", 1);
  expect(layer.view(), BITNET_CPU_UNKNOWN_PATH, "an unknown path");
  setenv("BITNET_CPU_PATH", path, 1);
  const Weights w(layer.view());
  CHECK(std::strcmp(bitnet_cpu_path(w.handle), path) == 0, "runs %s", bitnet_cpu_path(w.handle));
  float x[70] = {0}, y[18];
  std::vector<char> workspace(bitnet_cpu_workspace_bytes(w.handle, 1));
  void* ws = workspace.data();
  const auto prepare = [&](int64_t begin, int64_t end) {
    return bitnet_cpu_prepare(w.handle, x, BITNET_CPU_FLOAT32, 1, begin, end, ws);
  };
  const auto multiply = [&](int64_t begin, int64_t end, void* out) {
    return bitnet_cpu_multiply(w.handle, ws, 1, 0, 1, begin, end, out, BITNET_CPU_FLOAT32);
  };
  CHECK(prepare(0, 2) == BITNET_CPU_INVALID_ARGUMENT, "a row too many");
  CHECK(prepare(1, 1) == BITNET_CPU_OK, "no rows");
  CHECK(multiply(0, 3, y) == BITNET_CPU_INVALID_ARGUMENT, "a panel too many");
  CHECK(multiply(0, 2, nullptr) == BITNET_CPU_INVALID_ARGUMENT, "no output");
}

void test_half() {
  for (uint32_t h = 0; h < 65536; ++h) {
    const float f = bitnet_cpu::half_to_float(uint16_t(h));
    if (std::isnan(f)) continue;
    CHECK(bitnet_cpu::float_to_half(f) == h, "half %04x", h);
    const float next = bitnet_cpu::half_to_float(uint16_t(h + 1));
    if ((h & 0x7fff) >= 0x7bff || std::isnan(next)) continue;
    const uint32_t even = h % 2 ? h + 1 : h;  // midway goes to the even neighbour
    CHECK(bitnet_cpu::float_to_half((f + next) / 2) == even, "midway after %04x", h);
  }
  CHECK(bitnet_cpu::float_to_half(65519.0f) == 0x7bff, "largest");
  CHECK(bitnet_cpu::float_to_half(65520.0f) == 0x7c00, "overflow");
  CHECK(bitnet_cpu::half_to_float(0x3c01) == 1.0f + 1.0f / 1024, "one and a bit");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return std::printf("usage: %s PATH\n", argv[0]), 2;
  setenv("BITNET_CPU_PATH", argv[1], 1);
  std::mt19937 random(20240217);
  const Layer probe = reference::make_layer(Case{1, 1, 1}, random);
  if (Weights(probe.view()).status == BITNET_CPU_UNSUPPORTED_PATH) {
    std::printf("this processor cannot run %s\n", argv[1]);
    return 77;
  }
  test_half();
  test_refusals(random, argv[1]);
  test_shapes(random);
  test_groups(random);
  test_rectangles(random);
  test_extremes(random);
  test_not_finite(random);
  test_tiny(random);
  std::printf("%s: %s\n", argv[1], failures ? "FAILED" : "ok");
  return failures ? 1 : 0;
}
