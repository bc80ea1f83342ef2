// Adds up the partial sums of a tile kernel whose blocks shared outputs (params.splits > 1), and
// finishes the outputs. A launch of its own, with no counters in memory: nothing has to be zero
// before a launch, and the result does not depend on which block came last.
#include "epilogue.cuh"

namespace bitnet {
namespace {

constexpr int kThreads = 256;

// Sum: int32_t for quantized activations without group scales, otherwise float.
template <class T, class Sum, bool kGrouped>
__global__ void __launch_bounds__(kThreads) SumSplitsKernel(Params p) {
  const int n = blockIdx.x * kThreads + threadIdx.x;
  const int m = blockIdx.y;
  if (n >= p.n) return;
  const int64_t outputs = static_cast<int64_t>(p.m) * p.n;
  const Sum* partial = static_cast<const Sum*>(p.partial) + static_cast<int64_t>(m) * p.n + n;
  Sum sum = 0;
  for (int split = 0; split < p.splits; ++split) sum += partial[split * outputs];
  FinishOutput<T, kGrouped>(p, m, n, sum, LoadRow<kGrouped>(p, m), LoadColumn<kGrouped>(p, n));
}

template <class T>
Status LaunchTyped(const Params& params, Stream stream) {
  const dim3 grid(CeilDiv(params.n, kThreads), params.m);
  const auto kernel = params.units > 1    ? SumSplitsKernel<T, float, true>
                      : params.quantized ? SumSplitsKernel<T, int32_t, false>
                                         : SumSplitsKernel<T, float, false>;
  return LaunchKernel(kernel, grid, dim3(kThreads), 0, stream, params);
}

}  // namespace

Status LaunchSumSplits(const Params& params, DType type, Stream stream) {
  return type == DType::kFloat16 ? LaunchTyped<__half>(params, stream)
                                 : LaunchTyped<float>(params, stream);
}

}  // namespace bitnet
