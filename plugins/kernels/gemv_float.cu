// y = x . w^T for up to eight rows of x in floating point (activation_bits 0): the decoding
// kernel of models that cannot take int8 activations.
//
// Weights are decoded to fp16, two with one logic instruction and one multiply-add (TritPair), and
// widened to fp32 by one instruction each on the fp16 pipe, which nothing else here needs: the
// fp32 pipe is left to the products. Those are exact, for a trit is -1, 0 or 1; sums are fp32.
// Activations stay fp32 in shared memory, in the order in which trits leave a word.
#include "gemv.cuh"

namespace bitnet {
namespace {

constexpr int kRows = 2;
constexpr int kParts = kChunk / 4;  // float4 vectors of a chunk of activations
constexpr int kUnitWords = 2;       // words between two flushes with group scales: 32 weights

template <int kCols>
constexpr bool kOneTile = kCols >= 4;

template <int kCols>
size_t SharedBytes(const Params& p) {
  return static_cast<size_t>(kCols) * p.chunks_per_slice * kChunk * sizeof(float) +
         (size_t{1} << kBlockRowsLog2<kRows>) * kCols * sizeof(float);
}

// The slice's activations, sixteen at a time: vector q of the sixteen holds {2q, 8 + 2q, 2q + 1,
// 9 + 2q}, two pairs of TritPair.
template <class T, int kCols>
__device__ __forceinline__ void FillSlice(const Params& p, float4* planes, int slice_begin) {
  const T* x = static_cast<const T*>(p.x);
  const int groups = 4 * p.chunks_per_slice;
#pragma unroll 1
  for (int i = FreshThreadIndex(); i < groups * kCols; i += kGemvThreads) {
    const int column = i / groups, g = i % groups;
    float v[16] = {};
    if (column < p.m)
      Load16(x + static_cast<int64_t>(column) * p.k, kChunk * slice_begin + kGroup16 * g, p.k,
             p.aligned_x, v);
#pragma unroll
    for (int q = 0; q < 4; ++q)
      planes[PlaneIndex<kCols, kParts>(g / 4, g % 4 * 4 + q, column)] =
          make_float4(v[2 * q], v[8 + 2 * q], v[2 * q + 1], v[9 + 2 * q]);
  }
}

// sums[r][c] += word w of one chunk. chunk_x: where the chunk's activations lie.
template <int kCols>
__device__ __forceinline__ void AccumulateWord(const float4* chunk_x, int w,
                                               const uint4 (&weights)[kRows],
                                               float (&sums)[kRows][kCols]) {
#pragma unroll
  for (int quad = 0; quad < 4; ++quad) {
    float trits[kRows][4];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t pair = TritPair(Component(weights[r], w), 2 * quad + j);
        trits[r][2 * j] = LowHalf(pair);
        trits[r][2 * j + 1] = HighHalf(pair);
      }
    }
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      const float4 x = chunk_x[PlaneIndex<kCols, kParts>(0, 4 * w + quad, c)];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        sums[r][c] += x.x * trits[r][0];
        sums[r][c] += x.y * trits[r][1];
        sums[r][c] += x.z * trits[r][2];
        sums[r][c] += x.w * trits[r][3];
      }
    }
  }
}

// One chunk; with group scales, each 32 weights are summed and scaled for themselves.
template <int kCols, bool kGrouped>
__device__ __forceinline__ void AccumulateChunk(const Params& p, const float4* chunk_x, int chunk,
                                                const int (&scale_row)[kRows],
                                                const uint4 (&weights)[kRows],
                                                float (&sums)[kRows][kCols]) {
  if constexpr (!kGrouped) {
#pragma unroll
    for (int w = 0; w < 4; ++w) AccumulateWord<kCols>(chunk_x, w, weights, sums);
  } else {
#pragma unroll
    for (int begin = 0; begin < 4; begin += kUnitWords) {
      // The padding of the last chunk belongs to no group: its sums are 0, any scale will do.
      const uint32_t half = 2 * chunk + begin / kUnitWords;
      int unit = static_cast<int>(static_cast<uint64_t>(half) * p.unit_magic >> 31);
      unit = unit < p.units ? unit : p.units - 1;
      float unscaled[kRows][kCols] = {};
#pragma unroll
      for (int w = begin; w < begin + kUnitWords; ++w)
        AccumulateWord<kCols>(chunk_x, w, weights, unscaled);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float scale = p.scale[scale_row[r] + unit];
#pragma unroll
        for (int c = 0; c < kCols; ++c) sums[r][c] += unscaled[r][c] * scale;
      }
    }
  }
}

template <class T, int kCols, bool kGrouped>
__global__ void __launch_bounds__(kGemvThreads, kGemvBlocks) GemvFloatKernel(Params p) {
  BITNET_SHARED(float4, planes);
  float* scratch =
      reinterpret_cast<float*>(planes + kCols * p.chunks_per_slice * (kChunk / 4));
  const int tile_rows = GemvTileRows<kRows>(p);
  const bool one_slice = p.chunks_per_slice >= p.chunks;
  if (!kOneTile<kCols> && one_slice) FillSlice<T, kCols>(p, planes, 0);
  __syncthreads();

#pragma unroll 1
  for (int tile_row = blockIdx.x * tile_rows; tile_row < p.n; tile_row += gridDim.x * tile_rows) {
    float sums[kRows][kCols] = {};
#pragma unroll 1
    for (int begin = 0; begin < p.chunks; begin += p.chunks_per_slice) {
      const int left = p.chunks - begin;
      if (kOneTile<kCols> || !one_slice) {
        __syncthreads();
        FillSlice<T, kCols>(p, planes, begin);
        __syncthreads();
      }
      const GemvPlace place(p);
      int scale_row[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        scale_row[r] = LaneRow<kRows>(p, place, tile_row, r) * p.units;
      WalkRows<kRows, kCols <= 2>(
          p, tile_row, begin, left < p.chunks_per_slice ? left : p.chunks_per_slice,
          [&](int chunk, const uint4(&weights)[kRows]) {
            AccumulateChunk<kCols, kGrouped>(p, planes + PlaneIndex<kCols, kParts>(chunk, 0, 0),
                                             begin + chunk, scale_row, weights, sums);
          });
    }
    ReduceTile<kRows, kCols>(p, scratch, sums, tile_row, [&](int m, int n, float sum) {
      StoreOutput<T>(p, m, n, kGrouped ? sum : __fmul_rn(sum, WeightScale(p, n, 0)), 1.0f,
                     Bias(p, n));
    });
    if constexpr (kOneTile<kCols>) break;
  }
}

template <class T, int kCols>
Status LaunchColumns(Params params, const DeviceInfo& device, Stream stream) {
  int blocks = PlanGemv<kRows>(&params, kCols, kChunk * sizeof(float), device);
  if (kOneTile<kCols>)
    blocks = CeilDiv(params.n, 1 << (kBlockRowsLog2<kRows> - params.k_warps_log2));
  const auto kernel =
      params.units > 1 ? GemvFloatKernel<T, kCols, true> : GemvFloatKernel<T, kCols, false>;
  return LaunchKernel(kernel, dim3(blocks), dim3(kGemvThreads), SharedBytes<kCols>(params), stream,
                      params);
}

// More than four columns go four at a time: eight would not fit the registers, and multiplying,
// not reading weights, is what takes the time then.
template <class T>
Status LaunchTyped(Params params, const DeviceInfo& device, Stream stream) {
  if (params.m == 1) return LaunchColumns<T, 1>(params, device, stream);
  if (params.m == 2) return LaunchColumns<T, 2>(params, device, stream);
  if (params.m <= 4) return LaunchColumns<T, 4>(params, device, stream);
  Params first = params;
  first.m = 4;
  const Status status = LaunchColumns<T, 4>(first, device, stream);
  if (status != Status::kOk) return status;
  params.x = static_cast<const T*>(params.x) + int64_t{4} * params.k;
  params.y = static_cast<T*>(params.y) + int64_t{4} * params.n;
  params.m -= 4;
  return LaunchTyped<T>(params, device, stream);
}

}  // namespace

Status LaunchGemvFloat(const Params& params, DType type, const DeviceInfo& device, Stream stream) {
  return type == DType::kFloat16 ? LaunchTyped<__half>(params, device, stream)
                                 : LaunchTyped<float>(params, device, stream);
}

}  // namespace bitnet
