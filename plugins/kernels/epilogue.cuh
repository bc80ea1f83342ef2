// From sums to outputs: the op's last line, in one place so that every kernel rounds alike.
#pragma once

#include "activations.cuh"

namespace bitnet {

__device__ __forceinline__ float Bias(const Params& p, int n) { return p.bias ? p.bias[n] : 0.0f; }

// y = (sum * scale) * a + bias in fp32, no step fused: the reference's order, bit for bit.
// scaled_sum has its weight scale (or the sum over groups of scaled sums) already in it.
template <class T>
__device__ __forceinline__ void StoreOutput(const Params& p, int m, int n, float scaled_sum,
                                            float row_scale, float bias) {
  float y = p.quantized ? __fmul_rn(scaled_sum, row_scale) : scaled_sum;
  if (p.bias) y = __fadd_rn(y, bias);
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
// Decoded weights have no offset.
__device__ __forceinline__ float TritSum(float sum, int32_t) { return sum; }

// What the outputs of one row, or of one column of y have in common. A thread of a tile kernel
// reads those of all its outputs before it stores the first: behind a store the compiler has to
// read them again, since the store may have changed them, and each output would wait for them.
struct RowFactors {
  float scale;    // of the activations
  int32_t x_sum;  // of the activations; without group scales
};
struct ColumnFactors {
  float scale, bias;
};

// Rows and columns past the end have the last one's factors; their outputs are never stored.
__device__ __forceinline__ int ClampRow(const Params& p, int m) { return m < p.m ? m : p.m - 1; }
__device__ __forceinline__ int ClampColumn(const Params& p, int n) { return n < p.n ? n : p.n - 1; }

template <bool kGrouped>
__device__ __forceinline__ RowFactors LoadRow(const Params& p, int m) {
  const int row = ClampRow(p, m);
  return {p.quantized ? p.row_scale[row] : 1.0f,
          p.quantized && !kGrouped ? p.unit_sum[row] : 0};
}
template <bool kGrouped>
__device__ __forceinline__ ColumnFactors LoadColumn(const Params& p, int n) {
  const int column = ClampColumn(p, n);
  return {kGrouped ? 1.0f : WeightScale(p, column, 0), Bias(p, column)};
}

// The sum over activations of scale group `unit` in row m.
__device__ __forceinline__ int32_t UnitSum(const Params& p, int m, int unit) {
  return p.unit_sum[static_cast<int64_t>(ClampRow(p, m)) * p.units + unit];
}

// Finishes one output. sum: without group scales an int32 sum of codes times activations, or a
// float sum of weights times activations; with them, a float sum over groups, scaled.
template <class T, bool kGrouped, class Sum>
__device__ __forceinline__ void FinishOutput(const Params& p, int m, int n, Sum sum,
                                             const RowFactors& row, const ColumnFactors& column) {
  const float scaled =
      kGrouped ? static_cast<float>(sum) : __fmul_rn(TritSum(sum, row.x_sum), column.scale);
  StoreOutput<T>(p, m, n, scaled, row.scale, column.bias);
}

// Likewise at the end of a tile kernel, where the output may not exist, and where blocks that
// share it (splits) keep their sums for SumSplits instead.
template <class T, bool kGrouped, class Sum>
__device__ __forceinline__ void FinishTileOutput(const Params& p, int m, int n, Sum sum,
                                                 const RowFactors& row,
                                                 const ColumnFactors& column) {
  if (m >= p.m || n >= p.n) return;
  if (p.splits > 1) {
    const int64_t first = (static_cast<int64_t>(blockIdx.z) * p.m + m) * p.n;
    static_cast<Sum*>(p.partial)[first + n] = sum;
    return;
  }
  FinishOutput<T, kGrouped>(p, m, n, sum, row, column);
}

}  // namespace bitnet
