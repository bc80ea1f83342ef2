// y = x . w^T in tiles by fp32 multiply-adds: many rows of x with activation_bits 0, in fp32, or
// in fp16 on cards without real tensor cores.
//
// A thread owns 4 outputs times 4 rows of x (2 where there are at most 16). Activations lie
// transposed in shared memory, one vector for the thread's rows at each k. Weights are decoded to
// fp16 in pairs (TritPair) and widened to fp32 off the pipe that multiplies (see gemv_float.cu).
#include "tile.cuh"

namespace bitnet {
namespace {

constexpr int kThreads = 128;
constexpr int kThreadN = 4;
constexpr int kColumnsN = kTileN / kThreadN;  // threads along the outputs
static_assert(kTileN <= kThreads, "a thread loads at most one chunk of weights");

// The tile's shape by the rows of x that a thread owns.
template <int kThreadM>
struct Config {
  static constexpr int kTileM = kThreads / kColumnsN * kThreadM;
  static constexpr int kBufferX = kChunk * kTileM / 4;  // in float4: [k][row of x]
  static constexpr int kBufferW = kTileN;               // in uint4: one chunk a row
  static constexpr size_t kSharedBytes = 2 * (kBufferX + kBufferW) * 16;
  static_assert(kTileM * 4 <= kThreads, "a thread loads at most 16 activations");
};

template <int kThreadM>
struct alignas(4 * kThreadM) Rows {
  float row[kThreadM];
};

// Word w of the thread's outputs. x: the thread's rows, at k = 16 w of the chunk.
template <int kThreadM>
__device__ __forceinline__ void MultiplyWord(const Rows<kThreadM>* x,
                                             const uint4 (&weights)[kThreadN], int w,
                                             float (&sums)[kThreadN][kThreadM]) {
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const Rows<kThreadM> low = x[k * (kThreads / kColumnsN)];
    const Rows<kThreadM> high = x[(8 + k) * (kThreads / kColumnsN)];
#pragma unroll
    for (int n = 0; n < kThreadN; ++n) {
      const uint32_t pair = TritPair(Component(weights[n], w), k);
      const float low_trit = LowHalf(pair), high_trit = HighHalf(pair);
#pragma unroll
      for (int m = 0; m < kThreadM; ++m) {
        sums[n][m] += low.row[m] * low_trit;
        sums[n][m] += high.row[m] * high_trit;
      }
    }
  }
}

template <class T, int kThreadM, bool kGrouped>
__global__ void __launch_bounds__(kThreads) TileFloatKernel(Params p) {
  using C = Config<kThreadM>;
  BITNET_SHARED(float4, shared);
  const int first_n = blockIdx.x * kTileN, first_m = blockIdx.y * C::kTileM;
  const int thread_n = threadIdx.x % kColumnsN, thread_m = threadIdx.x / kColumnsN;
  const int load_m = threadIdx.x % C::kTileM, load_group = threadIdx.x / C::kTileM;
  uint4* shared_w = reinterpret_cast<uint4*>(shared + 2 * C::kBufferX);
  const ChunkRange range = BlockChunks(p);
  float next_x[16] = {};
  uint4 next_w;
  float sums[kThreadN][kThreadM] = {}, scaled[kThreadN][kThreadM] = {};

  const auto fetch = [&](int chunk) {
    if (load_group < 4 && first_m + load_m < p.m)
      Load16(static_cast<const T*>(p.x) + static_cast<int64_t>(first_m + load_m) * p.k,
             kChunk * chunk + kGroup16 * load_group, p.k, p.aligned_x, next_x);
    if (threadIdx.x < kTileN) next_w = FetchWeights(p, first_n + threadIdx.x, chunk, range.end);
  };
  const auto store = [&](int buffer) {
    float* x = reinterpret_cast<float*>(shared + buffer * C::kBufferX);
    if (load_group < 4) {
#pragma unroll
      for (int k = 0; k < 16; ++k)
        x[(kGroup16 * load_group + k) * C::kTileM + load_m] = next_x[k];
    }
    if (threadIdx.x < kTileN) shared_w[buffer * C::kBufferW + threadIdx.x] = next_w;
  };
  const auto flush = [&](int unit) {
#pragma unroll
    for (int n = 0; n < kThreadN; ++n) {
      const int out_n = first_n + thread_n + n * kColumnsN;
      const float scale = out_n < p.n ? WeightScale(p, out_n, unit) : 0.0f;
#pragma unroll
      for (int m = 0; m < kThreadM; ++m) {
        scaled[n][m] += sums[n][m] * scale;
        sums[n][m] = 0.0f;
      }
    }
  };
  WalkStages<1>(range, fetch, store, [&](int buffer, int chunk) {
    uint4 weights[kThreadN];
#pragma unroll
    for (int n = 0; n < kThreadN; ++n)
      weights[n] = shared_w[buffer * C::kBufferW + thread_n + n * kColumnsN];
    const float4* stage = shared + buffer * C::kBufferX;
    const auto* x = reinterpret_cast<const Rows<kThreadM>*>(stage) + thread_m;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      MultiplyWord(x + kGroup16 * w * (kThreads / kColumnsN), weights, w, sums);
      if constexpr (kGrouped) {
        const int end = chunk * kChunk + kGroup16 * (w + 1);
        if (end <= p.k && end % p.group_size == 0) flush(end / p.group_size - 1);
      }
    }
  });
  const RowFactors row = {1.0f, 0};
  ColumnFactors columns[kThreadN];
#pragma unroll
  for (int n = 0; n < kThreadN; ++n)
    columns[n] = LoadColumn<kGrouped>(p, first_n + thread_n + n * kColumnsN);
#pragma unroll
  for (int n = 0; n < kThreadN; ++n) {
#pragma unroll
    for (int m = 0; m < kThreadM; ++m)
      FinishTileOutput<T, kGrouped>(p, first_m + thread_m * kThreadM + m,
                                    first_n + thread_n + n * kColumnsN,
                                    kGrouped ? scaled[n][m] : sums[n][m], row, columns[n]);
  }
}

template <class T, int kThreadM>
Status LaunchConfig(const Params& params, Stream stream) {
  using C = Config<kThreadM>;
  const dim3 grid(CeilDiv(params.n, kTileN), CeilDiv(params.m, C::kTileM), params.splits);
  const auto kernel =
      params.units > 1 ? TileFloatKernel<T, kThreadM, true> : TileFloatKernel<T, kThreadM, false>;
  return LaunchKernel(kernel, grid, dim3(kThreads), C::kSharedBytes, stream, params);
}

template <class T>
Status LaunchTyped(const Params& params, Stream stream) {
  static_assert(Config<2>::kTileM == TileM(KernelFamily::kTileFloat, 1), "as splits assume");
  static_assert(Config<4>::kTileM == TileM(KernelFamily::kTileFloat, 17), "as splits assume");
  return TileM(KernelFamily::kTileFloat, params.m) == Config<2>::kTileM
             ? LaunchConfig<T, 2>(params, stream)
             : LaunchConfig<T, 4>(params, stream);
}

}  // namespace

Status LaunchTileFloat(const Params& params, DType type, Stream stream) {
  return type == DType::kFloat16 ? LaunchTyped<__half>(params, stream)
                                 : LaunchTyped<float>(params, stream);
}

}  // namespace bitnet
