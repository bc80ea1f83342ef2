// What the two GEMV kernels share: how lanes, warps and blocks divide the work, and the end of
// a tile.
//
// A weight row is read in chunks of 64 weights, one 16-byte load. Eight lanes walk one row, so a
// warp covers four rows at once, times kRows that each lane keeps in registers: 128 contiguous
// bytes a row and load, full lines, and little waste for short rows (K = 384 is six chunks). A
// block's eight warps either take different rows or, k_warps of them together, every k_warps-th
// step of the same rows: split-K inside the block, summed through shared memory. Activations lie
// in shared memory such that eight lanes with neighbouring chunks read 128 contiguous bytes
// (PlaneIndex).
#pragma once

#include "epilogue.cuh"

namespace bitnet {

inline constexpr int kGemvThreads = 256;
inline constexpr int kGemvWarps = kGemvThreads / 32;
// Turing holds four such blocks if threads keep to 64 registers. Later cards have the
// registers for 80 at three blocks, and their compiler spills at 64.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ > 750
inline constexpr int kGemvBlocks = 3;
#else
inline constexpr int kGemvBlocks = 4;
#endif
inline constexpr int kRowLanes = 8;                // lanes that walk one row
inline constexpr int kLaneRows = 32 / kRowLanes;   // rows a warp walks side by side

// Rows of a tile if no warps share rows; a power of two, so that shifts take indices apart.
template <int kRows>
constexpr int kBlockRowsLog2 = kRows == 2 ? 6 : 5;
static_assert(kGemvWarps * kLaneRows == 1 << kBlockRowsLog2<1>, "one register row a lane");

inline constexpr size_t kSliceBytes = 24 * 1024;   // activations: two blocks fit a Turing SM

// Where a thread stands in its block's tile.
struct GemvPlace {
  int warp_k;     // which of the k_warps
  int row_warp;   // which rows of the tile, in units of a warp's rows
  int row_lane;   // position along the row, 0..7
  int lane_row;   // 0..3
  __device__ __forceinline__ explicit GemvPlace(const Params& p) {
    const int thread = FreshThreadIndex(), warp = thread / 32, lane = thread % 32;
    warp_k = warp & ((1 << p.k_warps_log2) - 1);
    row_warp = warp >> p.k_warps_log2;
    row_lane = lane % kRowLanes;
    lane_row = lane / kRowLanes;
  }
};

template <int kRows>
__device__ __forceinline__ int GemvTileRows(const Params& p) {
  return 1 << (kBlockRowsLog2<kRows> - p.k_warps_log2);
}

// Where 16-byte part `part` of `kParts` of a chunk of column `column` lies, in units of 16 bytes:
// [chunk / 8][part][column][chunk % 8]. All but the first and last index are known when the
// kernel is compiled, so that one address register serves all loads of a step.
template <int kCols, int kParts>
__device__ __forceinline__ int PlaneIndex(int chunk, int part, int column) {
  return (chunk / kRowLanes * (kParts * kCols) + part * kCols + column) * kRowLanes +
         chunk % kRowLanes;
}

template <class Sum>
__device__ __forceinline__ Sum SumRowLanes(Sum v) {
#pragma unroll
  for (int lanes = kRowLanes / 2; lanes > 0; lanes /= 2)
    v += __shfl_xor_sync(0xffffffffu, v, lanes);
  return v;
}

// The row of w in register r of this lane. Rows past the end are computed again, never stored.
template <int kRows>
__device__ __forceinline__ int LaneRow(const Params& p, const GemvPlace& place, int tile_row,
                                       int r) {
  const int n = tile_row + (place.row_warp * kRows + r) * kLaneRows + place.lane_row;
  return n < p.n ? n : p.n - 1;
}

// The chunks one lane visits of its kRows weight rows. visit(chunk within the slice, weights
// [kRows]). kPrefetch: the next step's loads are in flight while this step's are used, where
// registers allow.
template <int kRows, bool kPrefetch, class Visit>
__device__ __forceinline__ void WalkRows(const Params& p, int tile_row, int slice_begin,
                                         int slice_chunks, Visit visit) {
  const GemvPlace place(p);
  int row[kRows];  // first chunk of the slice; CheckShape keeps n * K'/64 inside int32
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    row[r] = LaneRow<kRows>(p, place, tile_row, r) * p.chunks + slice_begin;
  const auto load = [&](int chunk, uint4(&weights)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      weights[r] = LoadStreaming(reinterpret_cast<const uint4*>(p.weight) + row[r] + chunk);
  };
  const int step = kRowLanes << p.k_warps_log2;
  int chunk = place.warp_k * kRowLanes + place.row_lane;
  uint4 weights[kRows], next[kRows];
  if (kPrefetch && chunk < slice_chunks) load(chunk, next);
#pragma unroll 1
  while (chunk < slice_chunks) {
    if constexpr (kPrefetch) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) weights[r] = next[r];
      if (chunk + step < slice_chunks) load(chunk + step, next);
    } else {
      load(chunk, weights);
    }
    visit(chunk, weights);
    chunk += step;
  }
}

// Adds the sums of the lanes, then of the k_warps, and hands out each output that exists:
// store(m, n, sum). scratch: kCols sums a row of kBlockRows, used by nothing else between two
// barriers of its caller's; free again on return.
template <int kRows, int kCols, class Sum, class StoreSum>
__device__ __forceinline__ void ReduceTile(const Params& p, Sum* scratch,
                                           const Sum (&sums)[kRows][kCols], int tile_row,
                                           StoreSum store) {
  const GemvPlace place(p);
  const int tile_rows = GemvTileRows<kRows>(p);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = (place.row_warp * kRows + r) * kLaneRows + place.lane_row;
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      const Sum sum = SumRowLanes(sums[r][c]);
      if (place.row_lane == c % kRowLanes)
        scratch[(place.warp_k * tile_rows + row) * kCols + c] = sum;
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int i = FreshThreadIndex(); i < tile_rows * kCols; i += kGemvThreads) {
    const int c = i >> (kBlockRowsLog2<kRows> - p.k_warps_log2), row = i & (tile_rows - 1);
    Sum sum = 0;
#pragma unroll 1
    for (int w = 0; w < 1 << p.k_warps_log2; ++w) sum += scratch[(w * tile_rows + row) * kCols + c];
    if (c < p.m && tile_row + row < p.n) store(c, tile_row + row, sum);
  }
  __syncthreads();
}

// Fills in the slices, k_warps and the grid of a GEMV over `columns` columns whose activations
// take bytes_per_chunk in shared memory. Warps share rows only while there are fewer than two
// waves of tiles (four blocks a multiprocessor) and each warp keeps two steps, so that its next
// loads are under way; below one wave, a single step will do. No more blocks than fit at once:
// each prepares the activations once and walks several tiles.
template <int kRows>
int PlanGemv(Params* p, int columns, int bytes_per_chunk, const DeviceInfo& device) {
  const int capacity = static_cast<int>(kSliceBytes) / (columns * bytes_per_chunk * kRowLanes);
  const int steps = CeilDiv(p->chunks, kRowLanes);
  const int slices = CeilDiv(steps, capacity);
  p->chunks_per_slice = CeilDiv(steps, slices) * kRowLanes;
  const int wave = 4 * device.sm_count;
  int log2 = 0;
  const auto tiles = [&] { return CeilDiv(p->n, 1 << (kBlockRowsLog2<kRows> - log2)); };
  const auto steps_if_split = [&] { return p->chunks_per_slice / (2 * kRowLanes << log2); };
  while (1 << log2 < kGemvWarps && ((tiles() < 2 * wave && steps_if_split() >= 2) ||
                                    (tiles() < wave && steps_if_split() >= 1)))
    ++log2;
  p->k_warps_log2 = log2;
  return CeilDiv(tiles(), CeilDiv(tiles(), wave));
}

}  // namespace bitnet
