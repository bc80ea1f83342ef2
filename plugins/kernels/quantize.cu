// Per-row absmax quantization of activations to int8, a launch of its own: for the tile kernels,
// and for GEMVs whose blocks would each repeat too much of it. One block a row.
#include "epilogue.cuh"

namespace bitnet {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kMaxWarps = kMaxThreads / 32;

// Shared: kMaxWarps maxima, then one sum a unit.
template <class T>
__global__ void __launch_bounds__(kMaxThreads) QuantizeKernel(Params p) {
  BITNET_SHARED(uint32_t, maxima);
  int32_t* sums = reinterpret_cast<int32_t*>(maxima + kMaxWarps);
  const int row = blockIdx.x, threads = blockDim.x;
  const T* x = static_cast<const T*>(p.x) + static_cast<int64_t>(row) * p.k;
  const int groups = 4 * p.chunks;

  uint32_t bits = 0;
  float v[16];
#pragma unroll 1
  for (int g = threadIdx.x; g < groups; g += threads) {
    Load16(x, kGroup16 * g, p.k, p.aligned_x, v);
    bits = MaxMagnitude(v, bits);
  }
  bits = WarpMax(bits);
  if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = bits;
  for (int u = threadIdx.x; u < p.units; u += threads) sums[u] = 0;
  __syncthreads();
  for (int w = 0; w < threads / 32; ++w) bits = maxima[w] > bits ? maxima[w] : bits;

  const float a = RowScale(bits), inverse_a = __fdiv_rn(1.0f, a);
  uint4* xq = reinterpret_cast<uint4*>(p.xq) + static_cast<int64_t>(row) * groups;
  int32_t own = 0;
#pragma unroll 1
  for (int g = threadIdx.x; g < groups; g += threads) {
    Load16(x, kGroup16 * g, p.k, p.aligned_x, v);
    const uint4 words = Quantize16(v, a, inverse_a);
    const int32_t sum = SumInt8(words);
    xq[g] = words;
    own += sum;
    // The padding past k sums to 0, but would count to a unit that is not there.
    if (p.units > 1 && kGroup16 * g < p.k) atomicAdd(&sums[kGroup16 * g / p.group_size], sum);
  }
  if (p.units == 1) {
    own = WarpSum(own);  // one addition a warp: those to one address take their turns
    if (threadIdx.x % 32 == 0) atomicAdd(&sums[0], own);
  }
  __syncthreads();
  int32_t* unit_sum = p.unit_sum + static_cast<int64_t>(row) * p.units;
  for (int u = threadIdx.x; u < p.units; u += threads) unit_sum[u] = sums[u];
  if (threadIdx.x == 0) p.row_scale[row] = a;
}

}  // namespace

Status LaunchQuantize(const Params& params, DType type, Stream stream) {
  // No more warps than have something to do: a short row would leave most of a large block idle,
  // and a multiprocessor holds few of those.
  const int warps = CeilDiv(4 * params.chunks, 32);
  const int threads = 32 * (warps < kMaxWarps ? warps : kMaxWarps);
  const size_t words = kMaxWarps + static_cast<size_t>(params.units);
  const size_t shared = CeilDiv(static_cast<int64_t>(words), 4) * size_t{16};
  const auto kernel = type == DType::kFloat16 ? QuantizeKernel<__half> : QuantizeKernel<float>;
  return LaunchKernel(kernel, dim3(params.m), dim3(threads), shared, stream, params);
}

}  // namespace bitnet
