// y = x . w^T in tiles, by the fp16 tensor cores with fp32 sums: activation_bits 0, fp16 x.
//
// mma m16n8k8: the left operand is x, the right one the weights, decoded to fp16 in registers.
// A lane holds word `quad` = lane % 4 of a chunk of 64 weights; its k-th mma multiplies elements
// k and 8 + k of that word, which one mask picks out of both half words at once, with the same
// two activations, which are stored side by side for it. Decoding two weights takes a logic
// instruction (the code becomes the mantissa of 1024) and one fp16 multiply-add, both exact.
#include "tile.cuh"

namespace bitnet {
namespace {

template <int kTileM_, int kWarpsM_, int kStage_>
struct Config {
  static constexpr int kTileM = kTileM_, kWarpsM = kWarpsM_, kStage = kStage_;
  static constexpr int kThreads = 128;
  static constexpr int kWarpsN = kThreads / 32 / kWarpsM;
  static constexpr int kFragmentsM = kTileM / kWarpsM / 16;  // of 16 rows of x, a warp
  static constexpr int kFragmentsN = kTileN / kWarpsN / 8;   // of 8 outputs, a warp
  // Row strides in uint4; the odd one puts a quarter warp's reads into different banks.
  static constexpr int kStrideX = 8 * kStage + 1;
  static constexpr int kStrideW = kStage + (kStage % 2 == 0);
  static constexpr int kBufferX = kTileM * kStrideX, kBufferW = kTileN * kStrideW;
  static constexpr int kLoadsX = CeilDiv(kTileM * 4 * kStage, kThreads);  // of 16 activations
  static constexpr int kLoadsW = CeilDiv(kTileN * kStage, kThreads);
  static constexpr size_t kSharedBytes = 2 * (kBufferX + kBufferW) * sizeof(uint4);
  static_assert(kTileM * 4 * kStage % kThreads == 0, "every thread loads activations");
};
using Small = Config<16, 1, 2>;
using Large = Config<64, 2, 1>;

// Sixteen activations as eight pairs {k, 8 + k}, in two uint4.
struct Pairs {
  uint32_t pair[8];
};

__device__ __forceinline__ uint32_t HalfBits(const __half* address) {
  return *reinterpret_cast<const uint16_t*>(address);
}

__device__ __forceinline__ Pairs FetchPairs(const Params& p, int m, int group, int end_chunk) {
  Pairs out = {};
  if (m >= p.m || group >= 4 * end_chunk) return out;
  const int begin = kGroup16 * group;
  const __half* x = static_cast<const __half*>(p.x) + static_cast<int64_t>(m) * p.k + begin;
  if (p.aligned_x && begin + 16 <= p.k) {
    const uint4 low = reinterpret_cast<const uint4*>(x)[0];
    const uint4 high = reinterpret_cast<const uint4*>(x)[1];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      out.pair[2 * t] = (Component(low, t) & 0xffffu) | Component(high, t) << 16;
      out.pair[2 * t + 1] = Component(low, t) >> 16 | (Component(high, t) & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const uint32_t low = begin + k < p.k ? HalfBits(x + k) : 0;
      const uint32_t high = begin + 8 + k < p.k ? HalfBits(x + 8 + k) : 0;
      out.pair[k] = low | high << 16;
    }
  }
  return out;
}

// The activations of one stage on their way through registers.
template <class Config>
struct PairStage {
  Pairs loads[Config::kLoadsX];
  static constexpr int kColumns = 4 * Config::kStage;

  __device__ __forceinline__ void Fetch(const Params& p, int first_m, int chunk, int end) {
#pragma unroll
    for (int i = 0; i < Config::kLoadsX; ++i) {
      const int index = i * Config::kThreads + threadIdx.x;
      loads[i] = FetchPairs(p, first_m + index / kColumns, 4 * chunk + index % kColumns, end);
    }
  }
  __device__ __forceinline__ void Store(uint4* shared) const {
#pragma unroll
    for (int i = 0; i < Config::kLoadsX; ++i) {
      const int index = i * Config::kThreads + threadIdx.x;
      uint4* to = shared + index / kColumns * Config::kStrideX + index % kColumns * 2;
      const uint32_t(&pair)[8] = loads[i].pair;
      to[0] = make_uint4(pair[0], pair[1], pair[2], pair[3]);
      to[1] = make_uint4(pair[4], pair[5], pair[6], pair[7]);
    }
  }
};

template <class C>
using Sums = float[C::kFragmentsM][C::kFragmentsN][4];

// One chunk. x, w: this warp's first row of each in shared memory, at the chunk.
template <class C>
__device__ __forceinline__ void MultiplyChunk(const uint4* x, const uint4* w, int lane,
                                              Sums<C>& sums) {
  const int row = lane / 4, quad = lane % 4;
  uint32_t words[C::kFragmentsN];
#pragma unroll
  for (int n = 0; n < C::kFragmentsN; ++n)
    words[n] = reinterpret_cast<const uint32_t*>(w + (8 * n + row) * C::kStrideW)[quad];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint4 a[C::kFragmentsM][2];
#pragma unroll
    for (int m = 0; m < C::kFragmentsM; ++m) {
      a[m][0] = x[(16 * m + row) * C::kStrideX + 2 * quad + half];
      a[m][1] = x[(16 * m + row + 8) * C::kStrideX + 2 * quad + half];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int n = 0; n < C::kFragmentsN; ++n) {
        const uint32_t trits = TritPair(words[n], 4 * half + i);
#pragma unroll
        for (int m = 0; m < C::kFragmentsM; ++m)
          MmaF16(sums[m][n], Component(a[m][0], i), Component(a[m][1], i), trits);
      }
    }
  }
}

// visit(m, n, j): the sum of row of x 16 m + lane / 4 + j / 2 * 8 and output
// 8 n + lane % 4 * 2 + j % 2 of the warp's tile.
template <class C, class Visit>
__device__ __forceinline__ void ForEachSum(Visit visit) {
#pragma unroll
  for (int m = 0; m < C::kFragmentsM; ++m) {
#pragma unroll
    for (int n = 0; n < C::kFragmentsN; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) visit(m, n, j);
    }
  }
}

template <class C, bool kGrouped>
__global__ void __launch_bounds__(C::kThreads) TileHmmaKernel(Params p) {
  BITNET_SHARED(uint4, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_n = blockIdx.x * kTileN, first_m = blockIdx.y * C::kTileM;
  const int warp_n = warp % C::kWarpsN * C::kFragmentsN * 8;
  const int warp_m = warp / C::kWarpsN * C::kFragmentsM * 16;
  uint4* shared_w = shared + 2 * C::kBufferX;
  const ChunkRange range = BlockChunks(p);
  PairStage<C> next_x;
  WeightStage<C> next_w;
  Sums<C> sums = {};
  float scaled[kGrouped ? C::kFragmentsM : 1][C::kFragmentsN][4] = {};
  const int lane_n = first_n + warp_n + lane % 4 * 2, lane_m = first_m + warp_m + lane / 4;

  const auto fetch = [&](int chunk) {
    next_x.Fetch(p, first_m, chunk, range.end);
    next_w.Fetch(p, first_n, chunk, range.end);
  };
  const auto store = [&](int buffer) {
    next_x.Store(shared + buffer * C::kBufferX);
    next_w.Store(shared_w + buffer * C::kBufferW);
  };
  const auto flush = [&](int chunk) {
    const int unit = chunk * kChunk / p.group_size;
    float scales[C::kFragmentsN][2];
#pragma unroll
    for (int n = 0; n < C::kFragmentsN; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j)
        scales[n][j] = WeightScale(p, ClampColumn(p, lane_n + 8 * n + j), unit);
    }
    ForEachSum<C>([&](int m, int n, int j) {
      scaled[kGrouped ? m : 0][n][j] += sums[m][n][j] * scales[n][j % 2];
      sums[m][n][j] = 0.0f;
    });
  };
  WalkStages<C::kStage>(range, fetch, store, [&](int buffer, int chunk) {
#pragma unroll
    for (int c = 0; c < C::kStage; ++c) {
      MultiplyChunk<C>(shared + buffer * C::kBufferX + warp_m * C::kStrideX + 8 * c,
                       shared_w + buffer * C::kBufferW + warp_n * C::kStrideW + c, lane, sums);
      if (kGrouped && chunk + c < range.end && GroupEnds(p, chunk + c)) flush(chunk + c);
    }
  });
  const RowFactors row = {1.0f, 0};
  ColumnFactors columns[C::kFragmentsN][2];
#pragma unroll
  for (int n = 0; n < C::kFragmentsN; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) columns[n][j] = LoadColumn<kGrouped>(p, lane_n + 8 * n + j);
  }
  ForEachSum<C>([&](int m, int n, int j) {
    const float sum = kGrouped ? scaled[kGrouped ? m : 0][n][j] : sums[m][n][j];
    FinishTileOutput<__half, kGrouped>(p, lane_m + 16 * m + j / 2 * 8, lane_n + 8 * n + j % 2, sum,
                                       row, columns[n][j % 2]);
  });
}

template <class C>
Status LaunchConfig(const Params& params, Stream stream) {
  const dim3 grid(CeilDiv(params.n, kTileN), CeilDiv(params.m, C::kTileM), params.splits);
  const auto kernel = params.units > 1 ? TileHmmaKernel<C, true> : TileHmmaKernel<C, false>;
  return LaunchKernel(kernel, grid, dim3(C::kThreads), C::kSharedBytes, stream, params);
}

}  // namespace

Status LaunchTileHmma(const Params& params, DType type, Stream stream) {
  if (type != DType::kFloat16) return Status::kUnsupported;
  return TileM(KernelFamily::kTileHmma, params.m) == Small::kTileM
             ? LaunchConfig<Small>(params, stream)
             : LaunchConfig<Large>(params, stream);
}

}  // namespace bitnet
