// What the files of the library share: the repacked layer, the workspace, the table of kernels.
//
// Repacked weights. 16 outputs make a panel. A step is 16 consecutive inputs of one panel, 64
// bytes: one 32-bit word an output, holding that output's 16 codes as the model file has them
// (input i in bits 2i), less one: code = w + 1 in {0, 1, 2}. A panel's steps lie one after the
// other, so every kernel streams its weights. Inputs are padded with code 1 (weight 0) up to
// whole steps, in every group of their own when there are group scales.
//
// (word >> 2j) & 0x03030303 picks inputs {j, 4 + j, 8 + j, 12 + j} as four bytes, and so
// quantized activations are stored in that order: byte 4j + b of a step is input 4b + j. The
// weights are never permuted.
#ifndef BITNET_CPU_INTERNAL_H_
#define BITNET_CPU_INTERNAL_H_

#include <stddef.h>
#include <stdint.h>

#include "bitnet_cpu.h"

#define BITNET_CPU_INLINE inline __attribute__((always_inline))

namespace bitnet_cpu {

constexpr int64_t kPanel = 16;      // outputs in a panel
constexpr int64_t kStep = 16;       // inputs in a step
constexpr int64_t kStepBytes = 64;  // of packed weights, for one panel
constexpr float kAbsmaxFloor = 1e-5f;
constexpr float kInt8Max = 127.0f;

// M rows of activations. int8: x [M, row_bytes] int8, absmax scale a [M], sums [M, groups] of
// the quantized inputs. float: x [M, row_bytes / 4] float; a and sums unused.
struct Workspace {
  uint8_t* x;
  float* a;
  int32_t* sums;
  int64_t row_bytes;
};

// A rectangle of Y.
struct Tile {
  int64_t row_begin, row_end, panel_begin, panel_end;
  void* y;
  bool half;
};

// The kernels of one instruction path.
struct Kernels {
  const char* name;
  void (*quantize)(const bitnet_cpu_weights& w, const Workspace& ws, const void* x, bool half,
                   int64_t row_begin, int64_t row_end);
  void (*to_float)(const bitnet_cpu_weights& w, const Workspace& ws, const void* x, bool half,
                   int64_t row_begin, int64_t row_end);
  void (*multiply_int8)(const bitnet_cpu_weights& w, const Workspace& ws, const Tile& tile);
  void (*multiply_float)(const bitnet_cpu_weights& w, const Workspace& ws, const Tile& tile);
};

extern const Kernels kPortableKernels;
#if defined(BITNET_CPU_X86)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvxVnniKernels;
extern const Kernels kAvx512VnniKernels;
#elif defined(BITNET_CPU_ARM64)
extern const Kernels kNeonKernels;
#endif

// The path to use: BITNET_CPU_PATH's, or the best this processor has.
bitnet_cpu_status choose_kernels(const Kernels** kernels);

}  // namespace bitnet_cpu

struct bitnet_cpu_weights {
  int64_t K, N;
  int64_t groups;          // 1 without group scales
  int64_t group_inputs;    // K / groups
  int64_t group_steps;     // steps of a group
  int64_t panels;
  int64_t activation_bits;
  const bitnet_cpu::Kernels* kernels;
  size_t bytes;
  uint8_t* codes;  // [panels, groups * group_steps, 64]
  float* scale;    // [groups, panels * 16]
  float* bias;     // [panels * 16], zeros without a bias

  // Always inlined: members have external linkage, and half.h says why nothing here may.
  BITNET_CPU_INLINE int64_t steps() const { return groups * group_steps; }
  BITNET_CPU_INLINE const uint8_t* panel(int64_t p) const {
    return codes + p * steps() * bitnet_cpu::kStepBytes;
  }
  BITNET_CPU_INLINE const float* panel_scale(int64_t g, int64_t p) const {
    return scale + (g * panels + p) * bitnet_cpu::kPanel;
  }
};

#endif  // BITNET_CPU_INTERNAL_H_
