// The portable path: plain C++ for any processor, and what the others are compared with when a
// bug is hunted. The compiler vectorizes what it can; nothing here is tuned.
#include <math.h>

#include "blocking.h"
#include "half.h"

namespace bitnet_cpu {
namespace {

float load_input(const void* x, bool half, int64_t i) {
  return half ? half_to_float(static_cast<const uint16_t*>(x)[i]) : static_cast<const float*>(x)[i];
}

// Where input i of a step lies among its 16 bytes: byte 4j + b is input 4b + j.
constexpr int position(int i) { return 4 * (i % 4) + i / 4; }

void quantize_row(const bitnet_cpu_weights& w, const Workspace& ws, const void* x, bool half,
                  int64_t row) {
  int8_t* out = reinterpret_cast<int8_t*>(ws.x + row * ws.row_bytes);
  int32_t* sums = ws.sums + row * w.groups;
  memset(out, 0, size_t(w.steps() * kStep));
  memset(sums, 0, size_t(w.groups) * sizeof(int32_t));
  float most = kAbsmaxFloor;
  bool finite = true;
  for (int64_t k = 0; k < w.K; ++k) {
    const float magnitude = fabsf(load_input(x, half, row * w.K + k));
    finite = finite && magnitude < INFINITY;
    if (magnitude > most) most = magnitude;
  }
  const float a = finite ? most / kInt8Max : NAN;  // 0 * NaN makes the whole row NaN
  ws.a[row] = a;
  for (int64_t k = 0; finite && k < w.K; ++k) {
    const int64_t g = k / w.group_inputs, i = k % w.group_inputs;
    const int32_t q = int32_t(nearbyintf(load_input(x, half, row * w.K + k) / a));
    out[(g * w.group_steps + i / kStep) * kStep + position(int(i % kStep))] = int8_t(q);
    sums[g] += q;
  }
}

void quantize(const bitnet_cpu_weights& w, const Workspace& ws, const void* x, bool half,
              int64_t row_begin, int64_t row_end) {
  for (int64_t r = row_begin; r < row_end; ++r) quantize_row(w, ws, x, half, r);
}

void to_float(const bitnet_cpu_weights& w, const Workspace& ws, const void* x, bool half,
              int64_t row_begin, int64_t row_end) {
  for (int64_t r = row_begin; r < row_end; ++r) {
    float* out = reinterpret_cast<float*>(ws.x + r * ws.row_bytes);
    for (int64_t g = 0; g < w.groups; ++g) {
      const int64_t k = r * w.K + g * w.group_inputs;
      for (int64_t i = 0; i < w.group_steps * kStep; ++i)
        *out++ = i < w.group_inputs ? load_input(x, half, k + i) : 0.0f;
    }
  }
}

struct Isa {
  static constexpr int64_t kRows = 4;
  static constexpr bool kEvenTiles = true;
  static constexpr int64_t kTilePanels = 1;
  static constexpr int64_t kChunkSteps = 16;
  static constexpr int64_t kGemvSteps = 16;
  static constexpr int64_t kFloatRows = 4;

  static void gemv(const uint8_t* x, Packed<1> packed, int64_t steps, int32_t* sums) {
    uint8_t unpacked[kChunkSteps * kStepBytes * 4];
    products<true>(1, x, 0, packed, steps, unpacked, sums);
  }

  // unpacked [steps, 4, 16, 4]: quarter j of a step, output, byte.
  template <bool First>
  static void products(int rows, const uint8_t* x, int64_t stride, Packed<1> packed,
                       int64_t steps, uint8_t* unpacked, int32_t* sums) {
    for (int64_t t = 0; First && t < steps; ++t) {
      const uint8_t* words = packed.first + t * kStepBytes;
      for (int j = 0; j < 4; ++j) {
        for (int i = 0; i < kStepBytes; ++i)
          unpacked[(t * 4 + j) * kStepBytes + i] = (words[i] >> (2 * j)) & 3;
      }
    }
    for (int r = 0; r < rows; ++r) {
      const int8_t* row = reinterpret_cast<const int8_t*>(x + r * stride);
      for (int64_t q = 0; q < steps * 4; ++q) {
        const uint8_t* codes = unpacked + q * kStepBytes;
        for (int n = 0; n < kPanel; ++n) {
          int32_t sum = 0;
          for (int b = 0; b < 4; ++b) sum += codes[n * 4 + b] * row[q * 4 + b];
          sums[r * kPanel + n] += sum;
        }
      }
    }
  }

  static void float_tile(int rows, const uint8_t* x, int64_t stride, const uint8_t* packed,
                         int64_t steps, float* sums) {
    for (int r = 0; r < rows; ++r) {
      const float* row = reinterpret_cast<const float*>(x + r * stride);
      float* out = sums + r * kPanel;
      for (int n = 0; n < kPanel; ++n) out[n] = 0.0f;
      for (int64_t t = 0; t < steps; ++t) {
        for (int i = 0; i < kStep; ++i) {
          for (int n = 0; n < kPanel; ++n) {
            const uint8_t byte = packed[t * kStepBytes + n * 4 + i / 4];
            out[n] += row[t * kStep + i] * float(int((byte >> (2 * (i % 4))) & 3) - 1);
          }
        }
      }
    }
  }

  static void store_half(const float* values, uint16_t* half) {
    for (int i = 0; i < kPanel; ++i) half[i] = float_to_half(values[i]);
  }
};

}  // namespace

const Kernels kPortableKernels = {"portable", quantize, to_float, multiply_int8<Isa>,
                                  multiply_float<Isa>};

}  // namespace bitnet_cpu
