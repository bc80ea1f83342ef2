// From sums to outputs: the op's last line, in one place so that every kernel rounds alike.
#pragma once

#include "activations.cuh"

namespace bitnet {

// y = (sum * scale) * a + bias in fp32, no step fused: the reference's order, bit for bit.
// scaled_sum has its weight scale (or the sum over groups of scaled sums) already in it.
template <class T>
__device__ __forceinline__ void StoreOutput(const Params& p, int m, int n, float scaled_sum,
                                            float row_scale) {
  float y = p.quantized ? __fmul_rn(scaled_sum, row_scale) : scaled_sum;
  if (p.bias) y = __fadd_rn(y, p.bias[n]);
  Store(static_cast<T*>(p.y) + static_cast<int64_t>(m) * p.n + n, y);
}

// The weight scale of output n in group `unit`.
__device__ __forceinline__ float WeightScale(const Params& p, int n, int unit) {
  return p.scale[static_cast<int64_t>(n) * p.scale_stride + unit];
}

// A sum of codes times activations minus the codes' offset of 2, that is the sum of trits times
// activations, as float.
__device__ __forceinline__ float TritSum(int32_t code_sum, int32_t x_sum) {
  return __int2float_rn(code_sum - 2 * x_sum);
}

// Ends a tile kernel for one output without group scales. sum is an int32 sum of codes times
// activations, or a float sum of weights times activations; where splits share the output it is
// kept for SumSplits instead.
__device__ __forceinline__ float ScaledSum(const Params& p, int m, int n, int32_t sum) {
  return __fmul_rn(TritSum(sum, p.unit_sum[m]), WeightScale(p, n, 0));
}
__device__ __forceinline__ float ScaledSum(const Params& p, int, int n, float sum) {
  return __fmul_rn(sum, WeightScale(p, n, 0));
}

template <class T, bool kGrouped, class Sum>
__device__ __forceinline__ void FinishTileOutput(const Params& p, int m, int n, Sum sum) {
  if (m >= p.m || n >= p.n) return;
  if (p.splits > 1) {
    const int64_t row = static_cast<int64_t>(blockIdx.z) * p.m + m;
    static_cast<Sum*>(p.partial)[row * p.n + n] = sum;
    return;
  }
  const float scaled = kGrouped ? static_cast<float>(sum) : ScaledSum(p, m, n, sum);
  StoreOutput<T>(p, m, n, scaled, p.quantized ? p.row_scale[m] : 1.0f);
}

}  // namespace bitnet
