// y = x . w^T for up to eight rows of x, activations in int8: the decoding kernel.
//
// `word & (0x03030303 << 2i)` takes four codes out of a packed word, each 4^i times too large,
// ready for dp4a (unsigned codes, signed activations): no shift, no unpacking. Sums of different
// i stay apart and are shifted right once at the end, which is exact; the codes' offset of 2 is
// taken off with the sum of the activations. With many columns separate sums would not fit 64
// registers: then the word is shifted first, which all columns share.
#include "gemv.cuh"

namespace bitnet {
namespace {

// Registers allow four integer sums an output for one column (and two, without group scales,
// which need float sums beside them), else two or one.
template <int kCols, bool kGrouped>
constexpr int kSums = kCols == 1 ? 4 : kCols == 2 ? (kGrouped ? 2 : 4) : 1;

constexpr int kMaxGroupedColumns = 4;
constexpr int kRows = 2;  // of weights a lane keeps in registers; each activation serves both

// Whether a block computes one tile and ends. The loop over tiles prepares the activations once
// for several, but costs registers that many columns do not have.
template <int kCols>
constexpr bool kOneTile = kCols >= 4;

// Shared memory of one block. Sizes in elements of the member's type.
template <int kCols>
struct Shared {
  uint4* planes;       // activations, by PlaneIndex with four parts
  int32_t* unit_sums;  // with group scales, sums of each 32: [chunk / 8][kCols][16]
  float* row_scales;   // [kCols]
  int32_t* row_sums;   // [kCols]; not used with group scales
  uint32_t* maxima;    // [kGemvWarps]
  void* scratch;       // ReduceTile's

  static constexpr int kFixedWords = 8 + 8 + 8 + 64 * kCols;
  static size_t Bytes(const Params& p) {
    const int chunks = p.chunks_per_slice;
    const int units = p.units > 1 ? 2 * chunks : 0;
    return static_cast<size_t>(kCols) * (64 * chunks) +
           CeilDiv(4 * (kCols * units + kFixedWords), 16) * size_t{16};
  }
  __device__ __forceinline__ Shared(uint4* memory, const Params& p) {
    planes = memory;
    unit_sums = reinterpret_cast<int32_t*>(planes + kCols * 4 * p.chunks_per_slice);
    const int units = p.units > 1 ? kCols * 2 * p.chunks_per_slice : 0;
    row_scales = reinterpret_cast<float*>(unit_sums + units);
    row_sums = reinterpret_cast<int32_t*>(row_scales + 8);
    maxima = reinterpret_cast<uint32_t*>(row_sums + 8);
    scratch = maxima + 8;
  }
};

// Puts 16 int8 activations, group g of the slice, where WalkRows' lanes read them, and keeps the
// sum of each 32. Whole warps call it: the two halves of a unit meet in neighbouring lanes.
template <int kCols, bool kGrouped>
__device__ __forceinline__ void Place16(const Params& p, const Shared<kCols>& shared, int column,
                                        int g, const uint4& words, int32_t sum) {
  const int pair = kGrouped ? sum + __shfl_xor_sync(0xffffffffu, sum, 1) : 0;
  if (g >= 4 * p.chunks_per_slice) return;
  shared.planes[PlaneIndex<kCols, 4>(g / 4, g % 4, column)] = words;
  if (kGrouped && g % 2 == 0) shared.unit_sums[(g / 32 * kCols + column) * 16 + g % 32 / 2] = pair;
}

// Quantizes all rows of x into shared memory; the slice is the whole row. Warps share a column.
template <class T, int kCols, bool kGrouped>
__device__ __forceinline__ void QuantizeSlice(const Params& p, const Shared<kCols>& shared) {
  constexpr int kShare = kGemvWarps / kCols;  // warps a column
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int column = warp / kShare, groups = 4 * p.chunks;
  const int first = warp % kShare * 32 + lane;
  const bool exists = column < p.m;
  const T* x = static_cast<const T*>(p.x) + static_cast<int64_t>(exists ? column : 0) * p.k;
  float v[16];

  uint32_t bits = 0;
#pragma unroll 1
  for (int g = first; g < groups && exists; g += kShare * 32) {
    Load16(x, kGroup16 * g, p.k, p.aligned_x, v);
    bits = MaxMagnitude(v, bits);
  }
  bits = WarpMax(bits);
  if (lane == 0) shared.maxima[warp] = bits;
  if (threadIdx.x < kCols) shared.row_sums[threadIdx.x] = 0;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kShare; ++w) {
    const uint32_t other = shared.maxima[column * kShare + w];
    bits = other > bits ? other : bits;
  }

  const float a = RowScale(bits), inverse_a = __fdiv_rn(1.0f, a);
  int32_t total = 0;
#pragma unroll 1
  for (int base = first - lane; base < groups; base += kShare * 32) {
    const int g = base + lane;
    int32_t sum = 0;
    uint4 words = make_uint4(0, 0, 0, 0);
    if (exists && g < groups) {
      Load16(x, kGroup16 * g, p.k, p.aligned_x, v);
      words = Quantize16(v, a, inverse_a);
      sum = SumInt8(words);
    }
    total += sum;
    Place16<kCols, kGrouped>(p, shared, column, g, words, sum);
  }
  if constexpr (!kGrouped) {
    total = WarpSum(total);  // one addition a warp: those to one address take their turns
    if (lane == 0) atomicAdd(&shared.row_sums[column], total);
  }
  if (first == 0) shared.row_scales[column] = a;
}

// Copies one slice of activations that LaunchQuantize prepared.
template <int kCols, bool kGrouped>
__device__ __forceinline__ void CopySlice(const Params& p, const Shared<kCols>& shared,
                                          int slice_begin, int slice_chunks) {
  const int slice_groups = 4 * p.chunks_per_slice, thread = FreshThreadIndex();
#pragma unroll 1
  for (int column = 0; column < kCols; ++column) {
    const uint4* xq = reinterpret_cast<const uint4*>(p.xq) +
                      static_cast<int64_t>(column) * 4 * p.chunks + 4 * slice_begin;
#pragma unroll 1
    for (int base = thread - thread % 32; base < slice_groups; base += kGemvThreads) {
      const int g = base + thread % 32;
      const bool exists = column < p.m && g < 4 * slice_chunks;
      const uint4 words = exists ? xq[g] : make_uint4(0, 0, 0, 0);
      Place16<kCols, kGrouped>(p, shared, column, g, words, kGrouped ? SumInt8(words) : 0);
    }
  }
  if (thread < kCols && thread < p.m) {
    shared.row_scales[thread] = p.row_scale[thread];
    shared.row_sums[thread] = kGrouped ? 0 : p.unit_sum[thread];
  }
}

// Code i of the four bytes of a word: scaled by 4^(i mod kSums), to keep apart in kSums sums.
template <int kSums>
__device__ __forceinline__ uint32_t Codes(uint32_t word, int i) {
  const int kept = i % kSums;
  return (word >> (2 * (i - kept))) & (0x03030303u << (2 * kept));
}

template <int kSums>
__device__ __forceinline__ int32_t Unscale(const int32_t (&sums)[kSums]) {
  int32_t total = sums[0];
#pragma unroll
  for (int i = 1; i < kSums; ++i) total += sums[i] >> (2 * i);  // multiples of 4^i: exact
  return total;
}

// sums[r][c] += words [begin, begin + count) of one chunk of kRows weight rows times kCols
// columns of activations. chunk_x: where the chunk's activations lie.
template <int kCols, int kSums>
__device__ __forceinline__ void Accumulate(const uint4* chunk_x, int begin, int count,
                                           const uint4 (&weights)[kRows],
                                           int32_t (&sums)[kRows][kCols][kSums]) {
#pragma unroll
  for (int w = begin; w < begin + count; ++w) {
    uint32_t codes[kRows][4];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) codes[r][i] = Codes<kSums>(Component(weights[r], w), i);
    }
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      const uint4 x = chunk_x[PlaneIndex<kCols, 4>(0, w, c)];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          sums[r][c][i % kSums] = Dp4a(codes[r][i], Component(x, i), sums[r][c][i % kSums]);
      }
    }
  }
}

// One slice of a tile without group scales: integer sums run through.
template <int kCols, int kSums>
__device__ __forceinline__ void WalkPlain(const Params& p, const Shared<kCols>& shared,
                                          int tile_row,
                                          int slice_begin, int slice_chunks,
                                          int32_t (&sums)[kRows][kCols][kSums]) {
  WalkRows<kRows, kCols <= 4>(p, tile_row, slice_begin, slice_chunks,
                       [&](int chunk, const uint4(&weights)[kRows]) {
                         const uint4* x = shared.planes + PlaneIndex<kCols, 4>(chunk, 0, 0);
                         Accumulate<kCols>(x, 0, 4, weights, sums);
                       });
}

// With group scales: after every kFlush words of a chunk the integer sum is complete for its
// group, or for this lane's share of it, and goes into a float sum.
template <int kFlush, int kCols>
__device__ __forceinline__ void WalkGrouped(const Params& p, const Shared<kCols>& shared,
                                            int tile_row,
                                            int slice_begin, int slice_chunks,
                                            float (&scaled)[kRows][kCols]) {
  const GemvPlace place(p);
  int scale_row[kRows];  // CheckShape keeps n * units inside int32
#pragma unroll
  for (int r = 0; r < kRows; ++r) scale_row[r] = LaneRow<kRows>(p, place, tile_row, r) * p.units;
  const auto visit = [&](int chunk, const uint4(&weights)[kRows]) {
    const uint4* chunk_x = shared.planes + PlaneIndex<kCols, 4>(chunk, 0, 0);
    const int32_t* chunk_sums = shared.unit_sums + (chunk / 8 * kCols * 8 + chunk % 8) * 2;
#pragma unroll
    for (int begin = 0; begin < 4; begin += kFlush) {
      // The padding of the last chunk belongs to no group: its sums are 0, any scale will do.
      const uint32_t half = 2 * (slice_begin + chunk) + begin / 2;
      int unit = static_cast<int>(static_cast<uint64_t>(half) * p.unit_magic >> 31);
      unit = unit < p.units ? unit : p.units - 1;
      int32_t sums[kRows][kCols][kSums<kCols, true>] = {};
      Accumulate<kCols>(chunk_x, begin, kFlush, weights, sums);
#pragma unroll
      for (int c = 0; c < kCols; ++c) {
        const int32_t* units = chunk_sums + c * 16 + begin / 2;
        const int32_t x_sum = kFlush == 4 ? units[0] + units[1] : units[0];
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          scaled[r][c] += TritSum(Unscale(sums[r][c]), x_sum) * p.scale[scale_row[r] + unit];
      }
    }
  };
  WalkRows<kRows, kCols <= 2>(p, tile_row, slice_begin, slice_chunks, visit);
}

// kFlush: words of a chunk between two group scales, 2 (group_size a multiple of 32) or 4 (of
// 64); 0 without group scales.
template <class T, int kCols, int kFlush>
__global__ void __launch_bounds__(kGemvThreads, kGemvBlocks) GemvDp4aKernel(Params p) {
  constexpr bool kGrouped = kFlush > 0;
  BITNET_SHARED(uint4, memory);
  const Shared<kCols> shared(memory, p);
  const int tile_rows = GemvTileRows<kRows>(p);
  const bool one_slice = p.chunks_per_slice >= p.chunks;
  if constexpr (kCols <= kMaxFusedColumns) {
    if (!p.xq) QuantizeSlice<T, kCols, kGrouped>(p, shared);
  }
  if (!kOneTile<kCols> && p.xq && one_slice) CopySlice<kCols, kGrouped>(p, shared, 0, p.chunks);
  __syncthreads();

#pragma unroll 1
  for (int tile_row = blockIdx.x * tile_rows; tile_row < p.n; tile_row += gridDim.x * tile_rows) {
    int32_t sums[kRows][kCols][kSums<kCols, false>] = {};
    float scaled[kRows][kCols] = {};
#pragma unroll 1
    for (int begin = 0; begin < p.chunks; begin += p.chunks_per_slice) {
      const int left = p.chunks - begin;
      const int slice_chunks = left < p.chunks_per_slice ? left : p.chunks_per_slice;
      if (p.xq && (kOneTile<kCols> || !one_slice)) {
        __syncthreads();
        CopySlice<kCols, kGrouped>(p, shared, begin, slice_chunks);
        __syncthreads();
      }
      if constexpr (kGrouped)
        WalkGrouped<kFlush>(p, shared, tile_row, begin, slice_chunks, scaled);
      else
        WalkPlain(p, shared, tile_row, begin, slice_chunks, sums);
    }
    if constexpr (kGrouped) {
      ReduceTile<kRows, kCols>(p, static_cast<float*>(shared.scratch), scaled, tile_row,
                        [&](int m, int n, float sum) {
                          StoreOutput<T>(p, m, n, sum, shared.row_scales[m], Bias(p, n));
                        });
    } else {
      int32_t totals[kRows][kCols];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < kCols; ++c) totals[r][c] = Unscale(sums[r][c]);
      }
      ReduceTile<kRows, kCols>(p, static_cast<int32_t*>(shared.scratch), totals, tile_row,
                        [&](int m, int n, int32_t sum) {
                          const float trits = TritSum(sum, shared.row_sums[m]);
                          StoreOutput<T>(p, m, n, __fmul_rn(trits, WeightScale(p, n, 0)),
                                         shared.row_scales[m], Bias(p, n));
                        });
    }
    if constexpr (kOneTile<kCols>) break;
  }
}

template <class T, int kCols, int kFlush>
Status LaunchFlush(Params params, const DeviceInfo& device, Stream stream) {
  int blocks = PlanGemv<kRows>(&params, kCols, kChunk, device);
  if (kOneTile<kCols>)
    blocks = CeilDiv(params.n, 1 << (kBlockRowsLog2<kRows> - params.k_warps_log2));
  return LaunchKernel(GemvDp4aKernel<T, kCols, kFlush>, dim3(blocks), dim3(kGemvThreads),
                      Shared<kCols>::Bytes(params), stream, params);
}

template <class T, int kCols>
Status LaunchColumns(const Params& params, const DeviceInfo& device, Stream stream) {
  if (params.units == 1) return LaunchFlush<T, kCols, 0>(params, device, stream);
  if constexpr (kCols <= kMaxGroupedColumns) {
    return params.group_size % kChunk ? LaunchFlush<T, kCols, 2>(params, device, stream)
                                      : LaunchFlush<T, kCols, 4>(params, device, stream);
  }
  return Status::kUnsupported;
}

// The params of rows [begin, begin + count) of x, which LaunchQuantize has already quantized.
Params RowsOf(Params p, int32_t begin, int32_t count, size_t element_bytes) {
  p.x = static_cast<const char*>(p.x) + static_cast<int64_t>(begin) * p.k * element_bytes;
  p.y = static_cast<char*>(p.y) + static_cast<int64_t>(begin) * p.n * element_bytes;
  p.xq += static_cast<int64_t>(begin) * p.chunks * (kChunk / 4);
  p.row_scale += begin;
  p.unit_sum += static_cast<int64_t>(begin) * p.units;
  p.m = count;
  return p;
}

template <class T>
Status LaunchTyped(const Params& params, const DeviceInfo& device, Stream stream) {
  const int32_t m = params.m;
  if (params.units > 1 && m > kMaxGroupedColumns) {  // the integer sums leave no room for more
    const int32_t first = kMaxGroupedColumns;
    const Status status = LaunchTyped<T>(RowsOf(params, 0, first, sizeof(T)), device, stream);
    if (status != Status::kOk) return status;
    return LaunchTyped<T>(RowsOf(params, first, m - first, sizeof(T)), device, stream);
  }
  if (m == 1) return LaunchColumns<T, 1>(params, device, stream);
  if (m == 2) return LaunchColumns<T, 2>(params, device, stream);
  if (m <= 4) return LaunchColumns<T, 4>(params, device, stream);
  return LaunchColumns<T, 8>(params, device, stream);
}

}  // namespace

Status LaunchGemvDp4a(const Params& params, DType type, const DeviceInfo& device, Stream stream) {
  return type == DType::kFloat16 ? LaunchTyped<__half>(params, device, stream)
                                 : LaunchTyped<float>(params, device, stream);
}

}  // namespace bitnet
