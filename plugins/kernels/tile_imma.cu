// y = x . w^T in tiles, by the int8 tensor cores: mma m8n8k16, codes u8 times activations s8.
//
// The weights are the left operand: its fragment wants from a lane four k of one output, which
// is one masked word, and the right operand's four k of one row of x, which is one component of
// the interleaved activations. Lane (row l/4, quad l%4) holds word `quad` of a chunk of 64 and
// the matching 16 activations, so the four masks of a word are four mma's that cover the chunk.
// Words are shifted before the mask here: one accumulator, and the decode serves all columns.
// Group scales: sizes that are multiples of 64 (a mma sums over a whole chunk).
#include "tile.cuh"

namespace bitnet {
namespace {

// kTileM rows of x by 64 outputs; kWarpsM x kWarpsN warps; kStage chunks of K a stage.
template <int kTileM_, int kWarpsM_, int kStage_>
struct Config {
  static constexpr int kTileM = kTileM_, kWarpsM = kWarpsM_, kStage = kStage_;
  static constexpr int kThreads = 128;
  static constexpr int kWarpsN = kThreads / 32 / kWarpsM;
  static constexpr int kFragmentsM = kTileM / kWarpsM / 8;  // of 8 rows of x, a warp
  static constexpr int kFragmentsN = kTileN / kWarpsN / 8;  // of 8 outputs, a warp
  // Row strides in uint4, such that a quarter warp's 16-byte reads, and a warp's 4-byte reads,
  // fall into different banks; each row starts 16-byte aligned.
  static constexpr int kStrideX = 4 * kStage + 4;
  static constexpr int kStrideW = kStage + 1;
  static constexpr int kBufferX = kTileM * kStrideX, kBufferW = kTileN * kStrideW;
  static constexpr int kLoadsX = kTileM * 4 * kStage / kThreads;
  static constexpr int kLoadsW = kTileN * kStage / kThreads;
  static constexpr size_t kSharedBytes = 2 * (kBufferX + kBufferW) * sizeof(uint4);
  static_assert(kSharedBytes <= 48 * 1024, "static limit of shared memory");
};
using Small = Config<16, 1, 4>;  // M <= 16: bound by the weights, longer runs of each row
using Large = Config<64, 2, 2>;

template <class C>
using Sums = int32_t[C::kFragmentsN][C::kFragmentsM][2];

// One chunk. x, w: this warp's first row of each in shared memory, at the chunk.
template <class C>
__device__ __forceinline__ void MultiplyChunk(const uint4* x, const uint4* w, int lane,
                                              Sums<C>& sums) {
  const int row = lane / 4, quad = lane % 4;
  uint4 activations[C::kFragmentsM];
#pragma unroll
  for (int m = 0; m < C::kFragmentsM; ++m) activations[m] = x[(8 * m + row) * C::kStrideX + quad];
#pragma unroll
  for (int n = 0; n < C::kFragmentsN; ++n) {
    const uint32_t word =
        reinterpret_cast<const uint32_t*>(w + (8 * n + row) * C::kStrideW)[quad];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t codes = word >> (2 * i) & 0x03030303u;
#pragma unroll
      for (int m = 0; m < C::kFragmentsM; ++m)
        MmaU8S8(sums[n][m], codes, Component(activations[m], i));
    }
  }
}

// visit(n, m, j): the sum of output 8 n + lane / 4 and row of x 8 m + lane % 4 * 2 + j of the
// warp's tile.
template <class C, class Visit>
__device__ __forceinline__ void ForEachSum(Visit visit) {
#pragma unroll
  for (int n = 0; n < C::kFragmentsN; ++n) {
#pragma unroll
    for (int m = 0; m < C::kFragmentsM; ++m) {
#pragma unroll
      for (int j = 0; j < 2; ++j) visit(n, m, j);
    }
  }
}

template <class T, class C, bool kGrouped>
__global__ void __launch_bounds__(C::kThreads) TileImmaKernel(Params p) {
  BITNET_SHARED(uint4, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_n = blockIdx.x * kTileN, first_m = blockIdx.y * C::kTileM;
  const int warp_n = warp % C::kWarpsN * C::kFragmentsN * 8;
  const int warp_m = warp / C::kWarpsN * C::kFragmentsM * 8;
  uint4* shared_w = shared + 2 * C::kBufferX;
  const ChunkRange range = BlockChunks(p);
  QuantizedStage<C> next_x;
  WeightStage<C> next_w;
  Sums<C> sums = {};
  float scaled[kGrouped ? C::kFragmentsN : 1][C::kFragmentsM][2] = {};
  const int lane_n = first_n + warp_n + lane / 4, lane_m = first_m + warp_m + lane % 4 * 2;

  const auto fetch = [&](int chunk) {
    next_x.Fetch(p, first_m, chunk, range.end);
    next_w.Fetch(p, first_n, chunk, range.end);
  };
  const auto store = [&](int buffer) {
    next_x.Store(shared + buffer * C::kBufferX);
    next_w.Store(shared_w + buffer * C::kBufferW);
  };
  // Adds the group that ends with `chunk` to the scaled sums.
  const auto flush = [&](int chunk) {
    const int unit = chunk * kChunk / p.group_size;
    float scales[C::kFragmentsN];
    int32_t x_sums[C::kFragmentsM][2];
#pragma unroll
    for (int n = 0; n < C::kFragmentsN; ++n)
      scales[n] = WeightScale(p, ClampColumn(p, lane_n + 8 * n), unit);
#pragma unroll
    for (int m = 0; m < C::kFragmentsM; ++m) {
#pragma unroll
      for (int j = 0; j < 2; ++j) x_sums[m][j] = UnitSum(p, lane_m + 8 * m + j, unit);
    }
    ForEachSum<C>([&](int n, int m, int j) {
      scaled[kGrouped ? n : 0][m][j] += TritSum(sums[n][m][j], x_sums[m][j]) * scales[n];
      sums[n][m][j] = 0;
    });
  };
  WalkStages<C::kStage>(range, fetch, store, [&](int buffer, int chunk) {
#pragma unroll
    for (int c = 0; c < C::kStage; ++c) {
      MultiplyChunk<C>(shared + buffer * C::kBufferX + warp_m * C::kStrideX + 4 * c,
                       shared_w + buffer * C::kBufferW + warp_n * C::kStrideW + c, lane, sums);
      if (kGrouped && chunk + c < range.end && GroupEnds(p, chunk + c)) flush(chunk + c);
    }
  });
  RowFactors rows[C::kFragmentsM][2];
  ColumnFactors columns[C::kFragmentsN];
#pragma unroll
  for (int n = 0; n < C::kFragmentsN; ++n) columns[n] = LoadColumn<kGrouped>(p, lane_n + 8 * n);
#pragma unroll
  for (int m = 0; m < C::kFragmentsM; ++m) {
#pragma unroll
    for (int j = 0; j < 2; ++j) rows[m][j] = LoadRow<kGrouped>(p, lane_m + 8 * m + j);
  }
  ForEachSum<C>([&](int n, int m, int j) {
    const int out_n = lane_n + 8 * n, out_m = lane_m + 8 * m + j;
    if constexpr (kGrouped)
      FinishTileOutput<T, true>(p, out_m, out_n, scaled[n][m][j], rows[m][j], columns[n]);
    else
      FinishTileOutput<T, false>(p, out_m, out_n, sums[n][m][j], rows[m][j], columns[n]);
  });
}

template <class T, class C>
Status LaunchConfig(const Params& params, Stream stream) {
  const dim3 grid(CeilDiv(params.n, kTileN), CeilDiv(params.m, C::kTileM), params.splits);
  const auto kernel = params.units > 1 ? TileImmaKernel<T, C, true> : TileImmaKernel<T, C, false>;
  return LaunchKernel(kernel, grid, dim3(C::kThreads), C::kSharedBytes, stream, params);
}

template <class T>
Status LaunchTyped(const Params& params, Stream stream) {
  return TileM(KernelFamily::kTileImma, params.m) == Small::kTileM
             ? LaunchConfig<T, Small>(params, stream)
             : LaunchConfig<T, Large>(params, stream);
}

}  // namespace

Status LaunchTileImma(const Params& params, DType type, Stream stream) {
  return type == DType::kFloat16 ? LaunchTyped<__half>(params, stream)
                                 : LaunchTyped<float>(params, stream);
}

}  // namespace bitnet
