// Checks a layer and repacks it (internal.h draws the layout). Runs once, when a model is loaded.
#include <stdlib.h>
#include <string.h>

#include <new>

#include "internal.h"

namespace bitnet_cpu {
namespace {

constexpr uint32_t kOnes = 0x55555555u;  // code 1 sixteen times: weight 0, also what w + 2 loses
constexpr int64_t kRowMultiple = 64;
// Sums of codes (0 to 2) times int8 activations run through a whole row in int32.
constexpr int64_t kMaxK = int64_t{1} << 23;
static_assert(kMaxK * 2 * 127 < (int64_t{1} << 31), "a row's sum fits an int32");
constexpr int64_t kMaxN = int64_t{1} << 31;
constexpr size_t kAlignment = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bitnet_cpu_status check(const bitnet_cpu_layer& l) {
  if (l.K < 1 || l.N < 1 || l.K > kMaxK || l.N >= kMaxN || !l.packed_weight || !l.scale)
    return BITNET_CPU_INVALID_ARGUMENT;
  if (l.group_size < 0 || (l.group_size && l.K % l.group_size))
    return BITNET_CPU_INVALID_ARGUMENT;
  if (l.activation_bits != 0 && l.activation_bits != 8) return BITNET_CPU_INVALID_ARGUMENT;
  const size_t row = size_t(ceil_div(l.K, kRowMultiple) * kRowMultiple / 4);
  const size_t n = size_t(l.N);
  const size_t groups = l.group_size ? size_t(l.K / l.group_size) : 1;
  const bool scale_fits =
      l.group_size ? l.scale_count == n * groups : l.scale_count == 1 || l.scale_count == n;
  return l.packed_weight_bytes == n * row && scale_fits ? BITNET_CPU_OK : BITNET_CPU_BAD_SHAPE;
}

// Inputs [k, k + count) of a packed row as one word of codes w + 1, padded with weight 0.
// Any bit of *corrupt is set when a code is 0.
uint32_t load_step(const uint8_t* row, int64_t k, int64_t count, uint32_t* corrupt) {
  uint32_t word = 0;
  if (k % kStep == 0) {  // rows are whole 16-byte units: this stays inside
    for (int i = 0; i < 4; ++i) word |= uint32_t(row[k / 4 + i]) << (8 * i);
  } else {
    for (int64_t i = 0; i < count; ++i)
      word |= uint32_t((row[(k + i) / 4] >> (2 * ((k + i) % 4))) & 3u) << (2 * i);
  }
  if (count < kStep) {
    const uint32_t kept = (1u << (2 * count)) - 1u;
    word = (word & kept) | (2u * kOnes & ~kept);
  }
  *corrupt |= ~(word | (word >> 1)) & kOnes;
  return word - kOnes;  // every code is at least 1: nothing is borrowed
}

bitnet_cpu_status repack_codes(const bitnet_cpu_layer& l, bitnet_cpu_weights* w) {
  const int64_t row_bytes = ceil_div(l.K, kRowMultiple) * kRowMultiple / 4;
  uint32_t corrupt = 0;
  for (int64_t n = 0; n < w->panels * kPanel; ++n) {
    const uint8_t* row = n < l.N ? l.packed_weight + n * row_bytes : nullptr;
    uint8_t* out = w->codes + (n / kPanel) * w->steps() * kStepBytes + (n % kPanel) * 4;
    for (int64_t g = 0; g < w->groups; ++g) {
      for (int64_t t = 0; t < w->group_steps; ++t, out += kStepBytes) {
        const int64_t left = w->group_inputs - t * kStep;
        const int64_t k = g * w->group_inputs + t * kStep;
        const uint32_t word =
            row ? load_step(row, k, left < kStep ? left : kStep, &corrupt) : kOnes;
        memcpy(out, &word, sizeof word);
      }
    }
  }
  return corrupt ? BITNET_CPU_CORRUPT_WEIGHTS : BITNET_CPU_OK;
}

void repack_scales(const bitnet_cpu_layer& l, bitnet_cpu_weights* w) {
  const int64_t width = w->panels * kPanel;
  for (int64_t g = 0; g < w->groups; ++g) {
    for (int64_t n = 0; n < width; ++n) {
      const float value = n >= l.N ? 0.0f
                          : l.scale_count == 1 ? l.scale[0] : l.scale[n * w->groups + g];
      w->scale[g * width + n] = value;
    }
  }
  for (int64_t n = 0; n < width; ++n) w->bias[n] = l.bias && n < l.N ? l.bias[n] : 0.0f;
}

bool allocate(bitnet_cpu_weights* w) {
  const size_t width = size_t(w->panels * kPanel);
  const size_t codes = size_t(w->panels * w->steps() * kStepBytes);
  const size_t floats = (size_t(w->groups) + 1) * width * sizeof(float);
  w->bytes = codes + floats;  // a multiple of 64, as aligned_alloc wants: panels are
  w->codes = static_cast<uint8_t*>(aligned_alloc(kAlignment, w->bytes));
  if (!w->codes) return false;
  w->scale = reinterpret_cast<float*>(w->codes + codes);
  w->bias = w->scale + size_t(w->groups) * width;
  return true;
}

}  // namespace
}  // namespace bitnet_cpu

using namespace bitnet_cpu;

bitnet_cpu_status bitnet_cpu_create(const bitnet_cpu_layer* layer, bitnet_cpu_weights** weights) {
  if (!layer || !weights) return BITNET_CPU_INVALID_ARGUMENT;
  *weights = nullptr;
  const Kernels* kernels = nullptr;
  bitnet_cpu_status status = check(*layer);
  if (status == BITNET_CPU_OK) status = choose_kernels(&kernels);
  if (status != BITNET_CPU_OK) return status;
  auto* w = new (std::nothrow) bitnet_cpu_weights{};
  if (!w) return BITNET_CPU_OUT_OF_MEMORY;
  w->K = layer->K;
  w->N = layer->N;
  w->groups = layer->group_size ? layer->K / layer->group_size : 1;
  w->group_inputs = layer->K / w->groups;
  w->group_steps = ceil_div(w->group_inputs, kStep);
  w->panels = ceil_div(layer->N, kPanel);
  w->activation_bits = layer->activation_bits;
  w->kernels = kernels;
  status = allocate(w) ? repack_codes(*layer, w) : BITNET_CPU_OUT_OF_MEMORY;
  if (status != BITNET_CPU_OK) {
    bitnet_cpu_destroy(w);
    return status;
  }
  repack_scales(*layer, w);
  *weights = w;
  return BITNET_CPU_OK;
}

void bitnet_cpu_destroy(bitnet_cpu_weights* weights) {
  if (!weights) return;
  free(weights->codes);
  delete weights;
}
