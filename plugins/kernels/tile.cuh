// What the tile kernels share: which chunks a block sums, and the two-stage walk along K.
//
// A block computes 64 outputs of kTileM rows of x. It walks K in stages: while the warps work on
// one stage in shared memory, the next is on its way from global memory into registers, and is
// stored into the other half of shared memory behind the barrier (Turing has no cp.async).
#pragma once

#include "epilogue.cuh"

namespace bitnet {

struct ChunkRange {
  int begin, end;
};

// The chunks of this block: all, or its share where blocks along z split K.
__device__ __forceinline__ ChunkRange BlockChunks(const Params& p) {
  const int begin = blockIdx.z * p.chunks_per_split;
  const int end = begin + p.chunks_per_split;
  return {begin, end < p.chunks ? end : p.chunks};
}

// fetch(chunk): global memory -> registers, for the stage that starts at chunk.
// store(buffer): registers -> half `buffer` of shared memory. compute(buffer, chunk).
template <int kStageChunks, class Fetch, class StoreStage, class Compute>
__device__ __forceinline__ void WalkStages(ChunkRange range, Fetch fetch, StoreStage store,
                                           Compute compute) {
  int buffer = 0;
  fetch(range.begin);
  store(0);
  __syncthreads();
#pragma unroll 1
  for (int chunk = range.begin; chunk < range.end; chunk += kStageChunks) {
    const bool more = chunk + kStageChunks < range.end;
    if (more) fetch(chunk + kStageChunks);
    compute(buffer, chunk);
    if (more) store(buffer ^ 1);
    buffer ^= 1;
    __syncthreads();
  }
}

// Whether a scale group ends with this chunk.
__device__ __forceinline__ bool GroupEnds(const Params& p, int chunk) {
  return (chunk + 1) * kChunk % p.group_size == 0;
}

// Weights of output n, chunk `chunk`; zero codes where there are none, which times zero
// activations is zero.
__device__ __forceinline__ uint4 FetchWeights(const Params& p, int n, int chunk, int end) {
  if (n >= p.n || chunk >= end) return make_uint4(0, 0, 0, 0);
  return LoadStreaming(reinterpret_cast<const uint4*>(p.weight) +
                       static_cast<int64_t>(n) * p.chunks + chunk);
}

// Sixteen quantized activations of row m; zeros where there are none. group: index of 16.
__device__ __forceinline__ uint4 FetchQuantized(const Params& p, int m, int group, int end_chunk) {
  if (m >= p.m || group >= 4 * end_chunk) return make_uint4(0, 0, 0, 0);
  return reinterpret_cast<const uint4*>(p.xq)[static_cast<int64_t>(m) * (4 * p.chunks) + group];
}

// The weights of one stage on their way through registers: Config::kStage chunks of 64 outputs.
// shared: Config::kBufferW vectors, rows Config::kStrideW apart.
template <class Config>
struct WeightStage {
  uint4 loads[Config::kLoadsW];

  __device__ __forceinline__ void Fetch(const Params& p, int first_n, int chunk, int end) {
    ForEach([&](int i, int row, int column) {
      loads[i] = FetchWeights(p, first_n + row, chunk + column, end);
    });
  }
  __device__ __forceinline__ void Store(uint4* shared) const {
    ForEach([&](int i, int row, int column) {
      shared[row * Config::kStrideW + column] = loads[i];
    });
  }

 private:
  template <class Visit>
  __device__ __forceinline__ static void ForEach(Visit visit) {
#pragma unroll
    for (int i = 0; i < Config::kLoadsW; ++i) {
      const int index = i * Config::kThreads + threadIdx.x;
      if (index < kTileN * Config::kStage)
        visit(i, index / Config::kStage, index % Config::kStage);
    }
  }
};

// Likewise the quantized activations of Config::kTileM rows of x, rows Config::kStrideX apart.
template <class Config>
struct QuantizedStage {
  uint4 loads[Config::kLoadsX];
  static constexpr int kColumns = 4 * Config::kStage;
  static_assert(Config::kLoadsX * Config::kThreads == Config::kTileM * kColumns, "all load");

  __device__ __forceinline__ void Fetch(const Params& p, int first_m, int chunk, int end) {
#pragma unroll
    for (int i = 0; i < Config::kLoadsX; ++i) {
      const int index = i * Config::kThreads + threadIdx.x;
      loads[i] =
          FetchQuantized(p, first_m + index / kColumns, 4 * chunk + index % kColumns, end);
    }
  }
  __device__ __forceinline__ void Store(uint4* shared) const {
#pragma unroll
    for (int i = 0; i < Config::kLoadsX; ++i) {
      const int index = i * Config::kThreads + threadIdx.x;
      shared[index / kColumns * Config::kStrideX + index % kColumns] = loads[i];
    }
  }
};

}  // namespace bitnet
