// The slow product; see reference.h.
#include "reference.h"

#include <cmath>

namespace reference {
namespace {

int64_t row_bytes(int64_t K) { return (K + 63) / 64 * 16; }

int64_t groups(const Case& shape) { return shape.group_size ? shape.K / shape.group_size : 1; }

// Quantizes one row; returns a.
float quantize(const float* x, int64_t K, std::vector<int64_t>* q) {
  float most = 1e-5f;
  for (int64_t k = 0; k < K; ++k) {
    if (!std::isfinite(x[k])) return NAN;
    most = std::fmax(most, std::fabs(x[k]));
  }
  const float a = most / 127.0f;
  for (int64_t k = 0; k < K; ++k) (*q)[size_t(k)] = int64_t(std::nearbyint(x[k] / a));
  return a;
}

}  // namespace

bitnet_cpu_layer Layer::view() const {
  return {shape.K,         shape.N,       shape.group_size, shape.activation_bits,
          packed.data(),   packed.size(), scale.data(),     scale.size(),
          shape.bias ? bias.data() : nullptr};
}

Layer make_layer(const Case& shape, std::mt19937& random, int constant) {
  Layer layer;
  layer.shape = shape;
  layer.trits.resize(size_t(shape.N * shape.K));
  layer.packed.assign(size_t(shape.N * row_bytes(shape.K)), 0xaa);
  for (int64_t n = 0; n < shape.N; ++n) {
    for (int64_t k = 0; k < shape.K; ++k) {
      const int w = constant == 2 ? int(random() % 3) - 1 : constant;
      layer.trits[size_t(n * shape.K + k)] = int8_t(w);
      uint8_t& byte = layer.packed[size_t(n * row_bytes(shape.K) + k / 4)];
      const int shift = int(2 * (k % 4));
      byte = uint8_t((byte & ~(3 << shift)) | (w + 2) << shift);
    }
  }
  std::uniform_real_distribution<float> positive(0.01f, 0.2f);
  std::normal_distribution<float> normal;
  const bool many = shape.group_size || shape.channel_scale;
  layer.scale.resize(many ? size_t(shape.N * groups(shape)) : 1);
  for (float& s : layer.scale) s = positive(random);
  layer.bias.resize(size_t(shape.N));
  for (float& b : layer.bias) b = normal(random);
  return layer;
}

std::vector<float> make_activations(const Case& shape, std::mt19937& random) {
  std::vector<float> x(size_t(shape.M * shape.K));
  std::normal_distribution<float> normal;
  for (size_t i = 0; i < x.size(); ++i) x[i] = i % 7 == 3 ? 0.0f : normal(random);
  // Row 0 has a = 1 exactly, so that halves are ties and must go to the even neighbour.
  for (int64_t k = 0; k < shape.K; ++k)
    x[size_t(k)] = k == 0 ? 127.0f : float(int(random() % 250) - 125) + float(k % 2) * 0.5f;
  // Row 1 lies within a rounding of halves of its a, where x / a and x * (1 / a) part.
  if (shape.M > 1) {
    float* row = x.data() + shape.K;
    row[0] = 1.0f + std::fabs(row[0]);
    const float a = row[0] / 127.0f;
    for (int64_t k = 1; k < shape.K; ++k) {
      const float half = (float(int(random() % 250) - 125) + 0.5f) * a;
      row[k] = k % 3 ? std::nextafter(half, k % 3 == 1 ? 1e9f : -1e9f) : half;
    }
  }
  return x;
}

std::vector<float> multiply(const Layer& layer, const std::vector<float>& x) {
  const Case& c = layer.shape;
  const int64_t count = groups(c), size = c.K / count;
  std::vector<float> y(size_t(c.M * c.N));
  std::vector<int64_t> q(static_cast<size_t>(c.K));
  for (int64_t m = 0; m < c.M; ++m) {
    const float* row = x.data() + m * c.K;
    const float a = c.activation_bits ? quantize(row, c.K, &q) : 1.0f;
    for (int64_t n = 0; n < c.N; ++n) {
      float total = 0.0f;
      for (int64_t g = 0; g < count; ++g) {
        int64_t exact = 0;
        double sum = 0.0;
        for (int64_t k = g * size; k < (g + 1) * size; ++k) {
          const int64_t w = layer.trits[size_t(n * c.K + k)];
          if (c.activation_bits)
            exact += w * q[size_t(k)];
          else
            sum += double(row[k]) * double(w);
        }
        const float scale =
            layer.scale.size() == 1 ? layer.scale[0] : layer.scale[size_t(n * count + g)];
        total += float(c.activation_bits ? double(exact) : sum) * scale;
      }
      const float scaled = total * a;
      y[size_t(m * c.N + n)] = c.bias ? scaled + layer.bias[size_t(n)] : scaled;
    }
  }
  return y;
}

}  // namespace reference
