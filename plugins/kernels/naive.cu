// The GPU-side reference: one thread computes one output straight from the op's definition, with
// nothing shared with the fast kernels but the bit layout. It also runs the legal shapes that no
// fast kernel takes (group sizes that are no multiple of 16).
#include "epilogue.cuh"

namespace bitnet {
namespace {

constexpr int kThreads = 128;

__device__ __forceinline__ int Trit(const Params& p, int n, int k) {
  const uint32_t word = p.weight[static_cast<int64_t>(n) * (4 * p.chunks) + k / 16];
  return static_cast<int>(word >> (2 * (k % 16)) & 3u) - 2;
}

template <class T>
__device__ float NaiveRowScale(const T* x, int k) {
  float s = 1e-5f;
  for (int i = 0; i < k; ++i) {
    const float magnitude = fabsf(ToFloat(x[i]));
    if (!(magnitude <= s)) s = magnitude;           // takes NaN
    if (magnitude != magnitude) break;              // and keeps it
  }
  return __fdiv_rn(s, 127.0f);
}

template <class T>
__global__ void __launch_bounds__(kThreads) NaiveKernel(Params p) {
  const int n = blockIdx.x * kThreads + threadIdx.x;
  if (n >= p.n) return;
  const int unit_size = p.group_size ? p.group_size : p.k;
  for (int m = blockIdx.y; m < p.m; m += gridDim.y) {
    const T* x = static_cast<const T*>(p.x) + static_cast<int64_t>(m) * p.k;
    const float a = p.quantized ? NaiveRowScale(x, p.k) : 1.0f;
    float scaled = 0.0f;
    for (int u = 0; u < p.units; ++u) {
      int32_t integer_sum = 0;
      double float_sum = 0.0;
      for (int k = u * unit_size; k < (u + 1) * unit_size; ++k) {
        const float v = ToFloat(x[k]);
        if (p.quantized) integer_sum += __float2int_rn(rintf(__fdiv_rn(v, a))) * Trit(p, n, k);
        else float_sum += static_cast<double>(v) * Trit(p, n, k);
      }
      const float sum = p.quantized ? __int2float_rn(integer_sum) : static_cast<float>(float_sum);
      scaled = __fadd_rn(scaled, __fmul_rn(sum, WeightScale(p, n, u)));
    }
    StoreOutput<T>(p, m, n, scaled, a, Bias(p, n));
  }
}

}  // namespace

Status LaunchNaive(const Params& params, DType type, Stream stream) {
  const dim3 grid(CeilDiv(params.n, kThreads), params.m < 65535 ? params.m : 65535);
  const auto kernel = type == DType::kFloat16 ? NaiveKernel<__half> : NaiveKernel<float>;
  return LaunchKernel(kernel, grid, dim3(kThreads), 0, stream, params);
}

}  // namespace bitnet
