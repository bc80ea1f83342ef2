// What the launcher hands to the kernels, and the launch function each kernel file offers.
// Internal to plugins/kernels; callers use ternary_matmul.h.
#pragma once

#include "ternary_matmul.h"

namespace bitnet {

inline constexpr int kChunk = 64;     // weights of one 16-byte load; K' is a multiple of it
inline constexpr int kGroup16 = 16;   // weights of one 32-bit word, int8 activations of one uint4
inline constexpr int kMaxGemvColumns = 8;
inline constexpr int kMaxFusedColumns = 4;  // of x that a GEMV quantizes by itself
inline constexpr int kMaxSplits = 8;

// One struct for every kernel, passed by value. K' stands for 64 * chunks.
struct Params {
  const void* x;             // [m, k] float or half
  const uint32_t* weight;    // [n, K'/16]
  const float* scale;        // [scale_count]
  const float* bias;         // [n] or null
  void* y;                   // [m, n]
  uint32_t* xq;              // [m, K'/4] int8 activations, interleaved; null: quantize in the GEMV
  float* row_scale;          // [m] s / 127 of each row; meaningful with xq
  int32_t* unit_sum;         // [m, units] sums of xq over each scale group (all of k without)
  void* partial;             // [splits, m, n] int32 or float sums, where splits > 1
  int32_t m, k, n;
  int32_t chunks;            // K' / 64
  int32_t group_size;        // 0: none
  int32_t units;             // scale groups of a row, 1 without
  int32_t scale_stride;      // elements of scale between outputs: 0 (one for all), 1, or units
  int32_t quantized;         // activation_bits == 8
  int32_t aligned_x;         // rows of x start at multiples of 16 bytes
  int32_t splits;            // blocks that share the sum of one output
  int32_t chunks_per_split;
  int32_t k_warps_log2;      // GEMV: log2 of the warps of a block that share one output's sum
  uint32_t unit_magic;       // GEMV: ceil(2^31 / (group_size / 32)), to divide by it
  int32_t chunks_per_slice;  // GEMV: activations held in shared memory at a time
};

constexpr int32_t CeilDiv(int64_t a, int64_t b) { return static_cast<int32_t>((a + b - 1) / b); }

// Each fills in what only it knows (grid, slices) and enqueues one kernel. Shapes were checked.
Status LaunchQuantize(const Params& params, DType type, Stream stream);
Status LaunchGemvDp4a(const Params& params, DType type, const DeviceInfo& device, Stream stream);
Status LaunchGemvFloat(const Params& params, DType type, const DeviceInfo& device, Stream stream);
Status LaunchTileDp4a(const Params& params, DType type, Stream stream);
Status LaunchTileImma(const Params& params, DType type, Stream stream);
Status LaunchTileFloat(const Params& params, DType type, Stream stream);
Status LaunchTileHmma(const Params& params, DType type, Stream stream);
Status LaunchSumSplits(const Params& params, DType type, Stream stream);
Status LaunchNaive(const Params& params, DType type, Stream stream);

// Rows of x one block of a tile kernel covers, for the launcher's choice of splits. All tile
// kernels cover 64 outputs a block.
inline constexpr int kTileN = 64;
constexpr int TileM(KernelFamily family, int32_t m) {
  if (m <= 16) return 16;
  return family == KernelFamily::kTileFloat ? 32 : 64;
}

}  // namespace bitnet
