// y = x . w^T in tiles by dp4a: many rows of x in int8 on cards without real tensor cores, and
// group sizes (any multiple of 16) that tensor-core fragments cannot follow.
//
// A thread owns kThreadN outputs times kThreadM rows of x, spread over the tile so that
// neighbouring threads read neighbouring rows of weights. A packed word is decoded once into four
// registers of codes and multiplied with the thread's rows of x; the arithmetic units that decode
// are not the ones that run dp4a, so the decode is nearly free.
#include "tile.cuh"

namespace bitnet {
namespace {

template <int kThreads_, int kTileM_, int kThreadN_, int kThreadM_>
struct Config {
  static constexpr int kThreads = kThreads_, kTileM = kTileM_;
  static constexpr int kThreadN = kThreadN_, kThreadM = kThreadM_;
  static constexpr int kStage = 2;                      // chunks
  static constexpr int kColumnsN = kTileN / kThreadN;   // threads along the outputs
  static constexpr int kStrideX = 4 * kStage + 1;       // in uint4; odd: different banks
  static constexpr int kStrideW = kStage + 1;
  static constexpr int kBufferX = kTileM * kStrideX, kBufferW = kTileN * kStrideW;
  static constexpr int kLoadsX = kTileM * 4 * kStage / kThreads;
  static constexpr int kLoadsW = CeilDiv(kTileN * kStage, kThreads);
  static constexpr size_t kSharedBytes = 2 * (kBufferX + kBufferW) * sizeof(uint4);
  static_assert(kColumnsN * (kTileM / kThreadM) == kThreads, "a thread for each piece");
};
using Small = Config<128, 16, 2, 4>;
using Large = Config<256, 64, 4, 4>;

template <class C>
using Sums = int32_t[C::kThreadN][C::kThreadM];

// One word (16 weights) of each of the thread's outputs. x: the thread's first row, at the word.
template <class C>
__device__ __forceinline__ void MultiplyWord(const uint4* x, const uint4 (&weights)[C::kThreadN],
                                             int w, Sums<C>& sums) {
  uint4 activations[C::kThreadM];
#pragma unroll
  for (int m = 0; m < C::kThreadM; ++m)
    activations[m] = x[m * (C::kTileM / C::kThreadM) * C::kStrideX];
#pragma unroll
  for (int n = 0; n < C::kThreadN; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t codes = Component(weights[n], w) >> (2 * i) & 0x03030303u;
#pragma unroll
      for (int m = 0; m < C::kThreadM; ++m)
        sums[n][m] = Dp4a(codes, Component(activations[m], i), sums[n][m]);
    }
  }
}

template <class T, class C, bool kGrouped>
__global__ void __launch_bounds__(C::kThreads) TileDp4aKernel(Params p) {
  BITNET_SHARED(uint4, shared);
  const int first_n = blockIdx.x * kTileN, first_m = blockIdx.y * C::kTileM;
  const int thread_n = threadIdx.x % C::kColumnsN, thread_m = threadIdx.x / C::kColumnsN;
  uint4* shared_w = shared + 2 * C::kBufferX;
  const ChunkRange range = BlockChunks(p);
  QuantizedStage<C> next_x;
  WeightStage<C> next_w;
  Sums<C> sums = {};
  float scaled[kGrouped ? C::kThreadN : 1][C::kThreadM] = {};
  const auto out_n = [&](int n) { return first_n + thread_n + n * C::kColumnsN; };
  const auto out_m = [&](int m) { return first_m + thread_m + m * (C::kTileM / C::kThreadM); };

  const auto fetch = [&](int chunk) {
    next_x.Fetch(p, first_m, chunk, range.end);
    next_w.Fetch(p, first_n, chunk, range.end);
  };
  const auto store = [&](int buffer) {
    next_x.Store(shared + buffer * C::kBufferX);
    next_w.Store(shared_w + buffer * C::kBufferW);
  };
  // Adds scale group `unit`, which is complete, to the scaled sums.
  const auto flush = [&](int unit) {
    int32_t x_sums[C::kThreadM];
#pragma unroll
    for (int m = 0; m < C::kThreadM; ++m) x_sums[m] = UnitSum(p, out_m(m), unit);
#pragma unroll
    for (int n = 0; n < C::kThreadN; ++n) {
      const float scale = WeightScale(p, ClampColumn(p, out_n(n)), unit);
#pragma unroll
      for (int m = 0; m < C::kThreadM; ++m) {
        scaled[kGrouped ? n : 0][m] += TritSum(sums[n][m], x_sums[m]) * scale;
        sums[n][m] = 0;
      }
    }
  };
  WalkStages<C::kStage>(range, fetch, store, [&](int buffer, int chunk) {
#pragma unroll 1
    for (int c = 0; c < C::kStage; ++c) {
      uint4 weights[C::kThreadN];
#pragma unroll
      for (int n = 0; n < C::kThreadN; ++n)
        weights[n] = shared_w[buffer * C::kBufferW +
                              (thread_n + n * C::kColumnsN) * C::kStrideW + c];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        MultiplyWord<C>(shared + buffer * C::kBufferX + thread_m * C::kStrideX + 4 * c + w,
                        weights, w, sums);
        if constexpr (kGrouped) {
          // A stage may reach past this block's chunks: what ends there is another block's.
          const int end = (chunk + c) * kChunk + kGroup16 * (w + 1);
          if (chunk + c < range.end && end <= p.k && end % p.group_size == 0)
            flush(end / p.group_size - 1);
        }
      }
    }
  });
  RowFactors rows[C::kThreadM];
  ColumnFactors columns[C::kThreadN];
#pragma unroll
  for (int m = 0; m < C::kThreadM; ++m) rows[m] = LoadRow<kGrouped>(p, out_m(m));
#pragma unroll
  for (int n = 0; n < C::kThreadN; ++n) columns[n] = LoadColumn<kGrouped>(p, out_n(n));
#pragma unroll
  for (int n = 0; n < C::kThreadN; ++n) {
#pragma unroll
    for (int m = 0; m < C::kThreadM; ++m) {
      if constexpr (kGrouped)
        FinishTileOutput<T, true>(p, out_m(m), out_n(n), scaled[n][m], rows[m], columns[n]);
      else
        FinishTileOutput<T, false>(p, out_m(m), out_n(n), sums[n][m], rows[m], columns[n]);
    }
  }
}

template <class T, class C>
Status LaunchConfig(const Params& params, Stream stream) {
  const dim3 grid(CeilDiv(params.n, kTileN), CeilDiv(params.m, C::kTileM), params.splits);
  const auto kernel = params.units > 1 ? TileDp4aKernel<T, C, true> : TileDp4aKernel<T, C, false>;
  return LaunchKernel(kernel, grid, dim3(C::kThreads), C::kSharedBytes, stream, params);
}

template <class T>
Status LaunchTyped(const Params& params, Stream stream) {
  return TileM(KernelFamily::kTileDp4a, params.m) == Small::kTileM
             ? LaunchConfig<T, Small>(params, stream)
             : LaunchConfig<T, Large>(params, stream);
}

}  // namespace

Status LaunchTileDp4a(const Params& params, DType type, Stream stream) {
  return type == DType::kFloat16 ? LaunchTyped<__half>(params, stream)
                                 : LaunchTyped<float>(params, stream);
}

}  // namespace bitnet
