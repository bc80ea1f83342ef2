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

}  // namespace bitnet
