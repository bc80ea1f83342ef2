// y = x . w^T in tiles by fp32 multiply-adds: many rows of x with activation_bits 0, in fp32, or
// in fp16 on cards without real tensor cores.
//
// A thread owns 4 outputs times 4 rows of x. Activations lie transposed in shared memory, one
// float4 for the thread's rows at each k, divided by 4^(k mod 8) so that a weight takes one
// logic instruction and one subtraction to decode (see ScaledTrit).
#include "tile.cuh"

namespace bitnet {
namespace {

constexpr int kThreads = 128;
constexpr int kThreadN = 4, kThreadM = 4;
constexpr int kTileRows = TileM(KernelFamily::kTileFloat, 1);  // rows of x
constexpr int kColumnsN = kTileN / kThreadN;                   // threads along the outputs
constexpr int kBufferX = kChunk * kTileRows / 4;               // in float4: [k][row of x / 4]
constexpr int kBufferW = kTileN;                               // in uint4: one chunk a row
constexpr size_t kSharedBytes = 2 * (kBufferX + kBufferW) * 16;
static_assert(kColumnsN * (kTileRows / kThreadM) == kThreads, "a thread for each piece");
static_assert(kTileRows * 4 == kThreads, "each thread loads 16 activations");
static_assert(kTileN <= kThreads, "a thread loads at most one chunk of weights");

using Sums = float[kThreadN][kThreadM];

// Word w of the thread's outputs. x: the thread's rows, at k = 16 w of the chunk.
__device__ __forceinline__ void MultiplyWord(const float4* x, const uint4 (&weights)[kThreadN],
                                             int w, Sums& sums) {
#pragma unroll
  for (int k = 0; k < 16; ++k) {
    const float4 v = x[k * (kTileRows / 4)];
#pragma unroll
    for (int n = 0; n < kThreadN; ++n) {
      const float trit = ScaledTrit(Component(weights[n], w) >> (k / 8 * 16), k % 8);
      sums[n][0] += v.x * trit;
      sums[n][1] += v.y * trit;
      sums[n][2] += v.z * trit;
      sums[n][3] += v.w * trit;
    }
  }
}

template <class T, bool kGrouped>
__global__ void __launch_bounds__(kThreads) TileFloatKernel(Params p) {
  BITNET_SHARED(float4, shared);
  const int first_n = blockIdx.x * kTileN, first_m = blockIdx.y * kTileRows;
  const int thread_n = threadIdx.x % kColumnsN, thread_m = threadIdx.x / kColumnsN;
  const int load_m = threadIdx.x % kTileRows, load_group = threadIdx.x / kTileRows;
  uint4* shared_w = reinterpret_cast<uint4*>(shared + 2 * kBufferX);
  const ChunkRange range = BlockChunks(p);
  float next_x[16] = {};
  uint4 next_w;
  Sums sums = {}, scaled = {};

  const auto fetch = [&](int chunk) {
    if (first_m + load_m < p.m)
      Load16(static_cast<const T*>(p.x) + static_cast<int64_t>(first_m + load_m) * p.k,
             kChunk * chunk + kGroup16 * load_group, p.k, p.aligned_x, next_x);
    if (threadIdx.x < kTileN) next_w = FetchWeights(p, first_n + threadIdx.x, chunk, range.end);
  };
  const auto store = [&](int buffer) {
    float* x = reinterpret_cast<float*>(shared + buffer * kBufferX);
#pragma unroll
    for (int k = 0; k < 16; ++k)
      x[(kGroup16 * load_group + k) * kTileRows + load_m] =
          next_x[k] * (1.0f / (1 << (2 * (k % 8))));
    if (threadIdx.x < kTileN) shared_w[buffer * kBufferW + threadIdx.x] = next_w;
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
      weights[n] = shared_w[buffer * kBufferW + thread_n + n * kColumnsN];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      MultiplyWord(shared + buffer * kBufferX + kGroup16 * w * (kTileRows / 4) + thread_m, weights,
                   w, sums);
      if constexpr (kGrouped) {
        const int end = chunk * kChunk + kGroup16 * (w + 1);
        if (end <= p.k && end % p.group_size == 0) flush(end / p.group_size - 1);
      }
    }
  });
#pragma unroll
  for (int n = 0; n < kThreadN; ++n) {
#pragma unroll
    for (int m = 0; m < kThreadM; ++m)
      FinishTileOutput<T, kGrouped>(p, first_m + thread_m * kThreadM + m,
                                    first_n + thread_n + n * kColumnsN,
                                    kGrouped ? scaled[n][m] : sums[n][m]);
  }
}

template <class T>
Status LaunchTyped(const Params& params, Stream stream) {
  const dim3 grid(CeilDiv(params.n, kTileN), CeilDiv(params.m, kTileRows), params.splits);
  const auto kernel = params.units > 1 ? TileFloatKernel<T, true> : TileFloatKernel<T, false>;
  return LaunchKernel(kernel, grid, dim3(kThreads), kSharedBytes, stream, params);
}

}  // namespace

Status LaunchTileFloat(const Params& params, DType type, Stream stream) {
  return type == DType::kFloat16 ? LaunchTyped<__half>(params, stream)
                                 : LaunchTyped<float>(params, stream);
}

}  // namespace bitnet
