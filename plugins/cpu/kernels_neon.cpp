// The 64-bit ARM path, for processors with the dot product instructions (ARMv8.2, as Cortex-A75,
// Neoverse and Apple M1 have): sdot multiplies 16 codes by 16 activations, fours into int32.
#include <arm_neon.h>

#include "blocking.h"

namespace bitnet_cpu {
namespace {

constexpr int kVectors = 4;  // of 4 outputs, in a panel

// ---- activations ----

// Inputs [i, i + 4) of a row, of which only those below n are read; the others are 0.
inline float32x4_t load4(const uint8_t* x, bool half, int64_t i, int64_t n) {
  const int64_t element = half ? 2 : 4;
  alignas(16) uint8_t values[16] = {0};
  if (i < n) memcpy(values, x + i * element, size_t(min64(n - i, 4) * element));
  if (half) return vcvt_f32_f16(vld1_f16(reinterpret_cast<const float16_t*>(values)));
  return vld1q_f32(reinterpret_cast<const float*>(values));
}

// The bits of max |x|. Compared as integers, so that NaN is the largest and is never lost.
inline uint32_t absmax_bits(const uint8_t* x, bool half, int64_t n) {
  uint32x4_t most = vdupq_n_u32(0);
  for (int64_t i = 0; i < n; i += 4)
    most = vmaxq_u32(most, vreinterpretq_u32_f32(vabsq_f32(load4(x, half, i, n))));
  return vmaxvq_u32(most);
}

// A step of 16 quantized inputs in the kernels' order: byte 4j + b is input 4b + j.
inline int8x16_t order_step(const int32x4_t (&q)[4]) {
  const int16x8_t low = vcombine_s16(vmovn_s32(q[0]), vmovn_s32(q[1]));
  const int16x8_t high = vcombine_s16(vmovn_s32(q[2]), vmovn_s32(q[3]));
  const uint8_t order[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  return vqtbl1q_s8(vcombine_s8(vmovn_s16(low), vmovn_s16(high)), vld1q_u8(order));
}

inline void quantize_row(const bitnet_cpu_weights& w, const Workspace& ws, int64_t row,
                         const uint8_t* x, bool half) {
  int8_t* out = reinterpret_cast<int8_t*>(ws.x + row * ws.row_bytes);
  int32_t* sums = ws.sums + row * w.groups;
  const uint32_t bits = absmax_bits(x, half, w.K);
  if (bits >= 0x7f800000u) {  // an infinity or NaN in the row: 0 * NaN makes all of it NaN
    ws.a[row] = __builtin_nanf("");
    memset(out, 0, size_t(w.steps() * kStep));
    memset(sums, 0, size_t(w.groups) * sizeof(int32_t));
    return;
  }
  float most;
  memcpy(&most, &bits, sizeof most);
  ws.a[row] = (most > kAbsmaxFloor ? most : kAbsmaxFloor) / kInt8Max;
  const float32x4_t a = vdupq_n_f32(ws.a[row]);
  for (int64_t g = 0; g < w.groups; ++g) {
    const uint8_t* group = x + g * w.group_inputs * (half ? 2 : 4);
    int32x4_t sum = vdupq_n_s32(0);
    for (int64_t k = 0; k < w.group_inputs; k += kStep, out += kStep) {
      int32x4_t q[4];
      for (int i = 0; i < 4; ++i) {  // rounds to nearest, ties to even
        q[i] = vcvtnq_s32_f32(vdivq_f32(load4(group, half, k + 4 * i, w.group_inputs), a));
        sum = vaddq_s32(sum, q[i]);
      }
      vst1q_s8(out, order_step(q));
    }
    sums[g] = vaddvq_s32(sum);
  }
}

void quantize(const bitnet_cpu_weights& w, const Workspace& ws, const void* x, bool half,
              int64_t row_begin, int64_t row_end) {
  for (int64_t r = row_begin; r < row_end; ++r)
    quantize_row(w, ws, r, static_cast<const uint8_t*>(x) + r * w.K * (half ? 2 : 4), half);
}

void to_float(const bitnet_cpu_weights& w, const Workspace& ws, const void* x, bool half,
              int64_t row_begin, int64_t row_end) {
  for (int64_t r = row_begin; r < row_end; ++r) {
    float* out = reinterpret_cast<float*>(ws.x + r * ws.row_bytes);
    for (int64_t g = 0; g < w.groups; ++g) {
      const int64_t first = r * w.K + g * w.group_inputs;
      const uint8_t* group = static_cast<const uint8_t*>(x) + first * (half ? 2 : 4);
      for (int64_t k = 0; k < w.group_steps * kStep; k += 4, out += 4)
        vst1q_f32(out, load4(group, half, k, w.group_inputs));
    }
  }
}

// ---- products ----

// sum + the products of 16 codes with lane J of x, four inputs. In assembly, for gcc would
// reorder the sums, copy and spill them.
template <int J>
inline __attribute__((always_inline)) int32x4_t dot(int32x4_t sum, uint8x16_t codes, int8x16_t x) {
  __asm__("sdot %0.4s, %1.16b, %2.4b[%3]" : "+w"(sum) : "w"(codes), "w"(x), "i"(J));
  return sum;
}

// unpacked [steps, 4, 64]: the codes of every step, a byte each. Before the first tile, for on its
// way there are not enough registers.
inline void unpack(const uint8_t* packed, int64_t steps, uint8_t* unpacked) {
  const uint8x16_t mask = vdupq_n_u8(3);
  for (int64_t i = 0; i < kVectors * steps; ++i, packed += 16) {
    uint8_t* out = unpacked + i / kVectors * 4 * kStepBytes + i % kVectors * 16;
    const uint8x16_t words = vld1q_u8(packed);
    vst1q_u8(out, vandq_u8(words, mask));
    vst1q_u8(out + kStepBytes, vandq_u8(vshrq_n_u8(words, 2), mask));
    vst1q_u8(out + 2 * kStepBytes, vandq_u8(vshrq_n_u8(words, 4), mask));
    vst1q_u8(out + 3 * kStepBytes, vshrq_n_u8(words, 6));
  }
}

// One quarter of a step for R rows: inputs J, 4 + J, 8 + J, 12 + J.
template <int R, int J>
inline __attribute__((always_inline)) void quarter_step(const int8x16_t (&x)[R],
                                                        const uint8_t* unpacked,
                                                        int32x4_t (&sum)[R][kVectors]) {
  for (int v = 0; v < kVectors; ++v) {
    const uint8x16_t codes = vld1q_u8(unpacked + kStepBytes * J + 16 * v);
    for (int r = 0; r < R; ++r) sum[r][v] = dot<J>(sum[r][v], codes, x[r]);
  }
}

// sums [R, 16] += x [R, 16 * steps] . codes.
template <int R>
inline void tile(const uint8_t* x, int64_t stride, const uint8_t* unpacked, int64_t steps,
                 int32_t* sums) {
  int32x4_t sum[R][kVectors];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) sum[r][v] = vld1q_s32(sums + r * kPanel + 4 * v);
  }
  for (int64_t t = 0; t < steps; ++t, x += kStep, unpacked += 4 * kStepBytes) {
    int8x16_t rows[R];
    for (int r = 0; r < R; ++r) rows[r] = vreinterpretq_s8_u8(vld1q_u8(x + r * stride));
    quarter_step<R, 0>(rows, unpacked, sum);
    quarter_step<R, 1>(rows, unpacked, sum);
    quarter_step<R, 2>(rows, unpacked, sum);
    quarter_step<R, 3>(rows, unpacked, sum);
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) vst1q_s32(sums + r * kPanel + 4 * v, sum[r][v]);
  }
}

// sums [R, 16] = x [R, 16 * steps] . w in float32.
template <int R>
inline void float_rows(const uint8_t* x, int64_t stride, const uint8_t* packed, int64_t steps,
                       float* sums) {
  float32x4_t sum[R][kVectors];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) sum[r][v] = vdupq_n_f32(0);
  }
  for (int64_t t = 0; t < steps; ++t, packed += kStepBytes) {
    for (int i = 0; i < kStep; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        const uint32x4_t words = vreinterpretq_u32_u8(vld1q_u8(packed + 16 * v));
        const uint32x4_t shifted = vshlq_u32(words, vdupq_n_s32(-2 * i));
        const uint32x4_t codes = vandq_u32(shifted, vdupq_n_u32(3));
        const float32x4_t weights = vsubq_f32(vcvtq_f32_u32(codes), vdupq_n_f32(1));
        for (int r = 0; r < R; ++r) {
          const float* row = reinterpret_cast<const float*>(x + r * stride);
          sum[r][v] = vfmaq_n_f32(sum[r][v], weights, row[t * kStep + i]);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) vst1q_f32(sums + r * kPanel + 4 * v, sum[r][v]);
  }
}

struct Isa {
  static constexpr int64_t kRows = 4;
  static constexpr bool kEvenTiles = true;
  static constexpr int64_t kTilePanels = 1;
  static constexpr int64_t kChunkSteps = 16;
  static constexpr int64_t kFloatRows = 4;
  static constexpr int64_t kGemvSteps = int64_t{1} << 16;
  static_assert(kGemvSteps * 4 * 2 * 127 * 16 < (int64_t{1} << 31), "gemv's sums fit an int32");

  // Codes masked where they are count 4 and 16 times; the last, being signed, is shifted down.
  static void gemv(const uint8_t* x, Packed<1> weights, int64_t steps, int32_t* sums) {
    const uint8_t* packed = weights.first;
    int32x4_t one[kVectors], four[kVectors], sixteen[kVectors];
    for (int v = 0; v < kVectors; ++v) one[v] = four[v] = sixteen[v] = vdupq_n_s32(0);
    for (int64_t t = 0; t < steps; ++t, x += kStep, packed += kStepBytes) {
      const int8x16_t row = vreinterpretq_s8_u8(vld1q_u8(x));
      for (int v = 0; v < kVectors; ++v) {
        const uint8x16_t words = vld1q_u8(packed + 16 * v);
        one[v] = dot<0>(one[v], vandq_u8(words, vdupq_n_u8(3)), row);
        four[v] = dot<1>(four[v], vandq_u8(words, vdupq_n_u8(12)), row);
        sixteen[v] = dot<2>(sixteen[v], vandq_u8(words, vdupq_n_u8(48)), row);
        one[v] = dot<3>(one[v], vshrq_n_u8(words, 6), row);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      int32x4_t all = vaddq_s32(vld1q_s32(sums + 4 * v), one[v]);
      all = vaddq_s32(all, vshrq_n_s32(four[v], 2));  // exact
      vst1q_s32(sums + 4 * v, vaddq_s32(all, vshrq_n_s32(sixteen[v], 4)));
    }
  }

  template <bool First>
  static void products(int rows, const uint8_t* x, int64_t stride, Packed<1> packed,
                       int64_t steps, uint8_t* unpacked, int32_t* sums) {
    if (First) unpack(packed.first, steps, unpacked);
    if (rows == 1) return tile<1>(x, stride, unpacked, steps, sums);
    if (rows == 2) return tile<2>(x, stride, unpacked, steps, sums);
    if (rows == 3) return tile<3>(x, stride, unpacked, steps, sums);
    return tile<4>(x, stride, unpacked, steps, sums);
  }
  static void float_tile(int rows, const uint8_t* x, int64_t stride, const uint8_t* packed,
                         int64_t steps, float* sums) {
    if (rows == 1) return float_rows<1>(x, stride, packed, steps, sums);
    if (rows == 2) return float_rows<2>(x, stride, packed, steps, sums);
    if (rows == 3) return float_rows<3>(x, stride, packed, steps, sums);
    return float_rows<4>(x, stride, packed, steps, sums);
  }
  static void store_half(const float* values, uint16_t* half) {
    for (int v = 0; v < kVectors; ++v) {
      const float16x4_t h = vcvt_f16_f32(vld1q_f32(values + 4 * v));
      vst1_u16(half + 4 * v, vreinterpret_u16_f16(h));
    }
  }
};

}  // namespace

const Kernels kNeonKernels = {"neon", quantize, to_float, multiply_int8<Isa>, multiply_float<Isa>};

}  // namespace bitnet_cpu
