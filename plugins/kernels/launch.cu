// The public entry points of ternary_matmul.h: what is legal, which family runs what, how the
// workspace is laid out, and the order of launches. No kernels here.
#include <cstring>

#include "device_ops.cuh"
#include "params.h"

namespace bitnet {
namespace {

// Sums of activations for each scale group pass through shared memory, 4 bytes a group.
constexpr int32_t kMaxUnits = 8192;
// Splitting K pays while a block sums few rows: the partial sums must stay small beside w.
constexpr int32_t kMaxSplitM = 64;
constexpr int32_t kMinChunksPerSplit = 8;
// Blocks that splitting may come to, whatever the card: the workspace an engine keeps must do on
// every card that loads it, of which some have more multiprocessors than the one that built it.
constexpr int64_t kMaxSplitBlocks = 512;
// Quantizing inside the GEMV repeats the work in every block; beyond this many activations a
// launch of its own is cheaper.
constexpr int64_t kMaxFusedActivations = 8192;
constexpr int64_t kMaxFusedRow = 24 * 1024;  // one row fills the GEMV's shared memory

int32_t Chunks(int32_t k) { return CeilDiv(k, kChunk); }

// A single group is no group: one scale an output.
int32_t Units(const TernaryMatMulShape& s) { return s.group_size ? s.k / s.group_size : 1; }

bool IsTile(KernelFamily family) {
  return family == KernelFamily::kTileDp4a || family == KernelFamily::kTileImma ||
         family == KernelFamily::kTileFloat || family == KernelFamily::kTileHmma;
}

bool QuantizesInside(KernelFamily family, const TernaryMatMulShape& s) {
  const int64_t row = int64_t{kChunk} * Chunks(s.k);
  if (family != KernelFamily::kGemvDp4a || s.m > kMaxFusedColumns) return false;
  return s.m == 1 ? row <= kMaxFusedRow : s.m * row <= kMaxFusedActivations;
}

// Multiples of this many chunks at which K may be split: whole scale groups. 0: nowhere.
int32_t SplitStep(const TernaryMatMulShape& s) {
  if (Units(s) == 1) return 1;
  if (s.group_size % kChunk == 0) return s.group_size / kChunk;
  return kChunk % s.group_size == 0 ? 1 : 0;
}

struct SplitPlan {
  int32_t splits, chunks_per_split;
};

int64_t MaxSplits(const TernaryMatMulShape& s) {
  const int64_t by_chunks = Chunks(s.k) / kMinChunksPerSplit;
  return by_chunks < kMaxSplits ? by_chunks : kMaxSplits;
}

// Blocks along K only while there are fewer than two waves (two blocks a multiprocessor) of them.
SplitPlan PlanSplits(KernelFamily family, const TernaryMatMulShape& s, const DeviceInfo& device) {
  const int32_t chunks = Chunks(s.k), step = SplitStep(s);
  const SplitPlan whole{1, chunks};
  if (!IsTile(family) || s.m > kMaxSplitM || step == 0) return whole;
  const int64_t blocks = int64_t{CeilDiv(s.n, kTileN)} * CeilDiv(s.m, TileM(family, s.m));
  const int64_t waves = 4 * int64_t{device.sm_count};
  int64_t splits = (waves < kMaxSplitBlocks ? waves : kMaxSplitBlocks) / blocks;
  splits = splits < MaxSplits(s) ? splits : MaxSplits(s);
  if (splits < 2) return whole;
  const int32_t per_split = CeilDiv(CeilDiv(chunks, splits), step) * step;
  return {CeilDiv(chunks, per_split), per_split};
}

constexpr size_t Align(size_t bytes) {
  return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}

// Where things lie in the workspace, in bytes.
struct Layout {
  size_t xq = 0, row_scale = 0, unit_sum = 0, partial = 0, end = 0;
};

Layout LayOut(const TernaryMatMulShape& s, size_t partial_bytes) {
  Layout layout;
  const size_t m = s.m;
  layout.row_scale = layout.xq + (s.activation_bits ? Align(m * kChunk * Chunks(s.k)) : 0);
  layout.unit_sum = layout.row_scale + (s.activation_bits ? Align(m * sizeof(float)) : 0);
  layout.partial =
      layout.unit_sum + (s.activation_bits ? Align(m * Units(s) * sizeof(int32_t)) : 0);
  layout.end = layout.partial + Align(partial_bytes);
  return layout;
}

Params MakeParams(const TernaryMatMulShape& s, DType type,
                  const TernaryMatMulArgs& args) {
  Params p = {};
  p.x = args.x;
  p.weight = args.packed_weight;
  p.scale = args.scale;
  p.bias = args.bias;
  p.y = args.y;
  p.m = s.m;
  p.k = s.k;
  p.n = s.n;
  p.chunks = Chunks(s.k);
  p.units = Units(s);
  p.group_size = p.units > 1 ? s.group_size : 0;
  p.scale_stride = s.scale_count == 1 ? 0 : p.units;
  p.quantized = s.activation_bits == 8;
  const size_t element = type == DType::kFloat16 ? 2 : 4;
  p.aligned_x = s.k * element % 16 == 0 && reinterpret_cast<uintptr_t>(args.x) % 16 == 0;
  p.splits = 1;
  p.chunks_per_split = p.chunks;
  if (p.group_size % 32 == 0 && p.group_size)
    p.unit_magic = static_cast<uint32_t>(((int64_t{1} << 31) + p.group_size / 32 - 1) /
                                         (p.group_size / 32));
  return p;
}

Status CheckArgs(const TernaryMatMulArgs& args, size_t needed) {
  if (!args.x || !args.packed_weight || !args.scale || !args.y) return Status::kInvalidArgument;
  const auto weight = reinterpret_cast<uintptr_t>(args.packed_weight);
  if (weight % kWeightAlignment) return Status::kMisaligned;
  if (!needed) return Status::kOk;
  if (!args.workspace) return Status::kInvalidArgument;
  if (reinterpret_cast<uintptr_t>(args.workspace) % kWorkspaceAlignment) return Status::kMisaligned;
  return args.workspace_bytes < needed ? Status::kWorkspaceTooSmall : Status::kOk;
}

Status LaunchFamily(KernelFamily family, const Params& p, DType type, const DeviceInfo& device,
                    Stream stream) {
  switch (family) {
    case KernelFamily::kGemvDp4a: return LaunchGemvDp4a(p, type, device, stream);
    case KernelFamily::kGemvFloat: return LaunchGemvFloat(p, type, device, stream);
    case KernelFamily::kTileDp4a: return LaunchTileDp4a(p, type, stream);
    case KernelFamily::kTileImma: return LaunchTileImma(p, type, stream);
    case KernelFamily::kTileFloat: return LaunchTileFloat(p, type, stream);
    case KernelFamily::kTileHmma: return LaunchTileHmma(p, type, stream);
    case KernelFamily::kNaive: return LaunchNaive(p, type, stream);
    case KernelFamily::kAuto: break;
  }
  return Status::kUnsupported;
}

}  // namespace

DeviceInfo MakeDeviceInfo(const char* name, int32_t sm, int32_t sm_count) {
  DeviceInfo device{sm, sm_count, sm > 75};
  // Of the 7.5 chips, TU116 and TU117 (GTX 16, MX, T400 to T2000) have no tensor cores worth the
  // name. An unknown name counts as one of them: dp4a is right everywhere, and never slow.
  if (sm != 75 || !name) return device;
  device.real_tensor_cores = std::strstr(name, "RTX") != nullptr;
  for (const char* real : {"T4", "T4G", "T10", "T40"}) {  // and "GRID T4-16Q", a share of a T4
    for (const char* at = std::strstr(name, real); at; at = std::strstr(at + 1, real)) {
      const char end = at[std::strlen(real)];
      const bool word = (at == name || at[-1] == ' ') && (end == '\0' || end == ' ' || end == '-');
      device.real_tensor_cores = device.real_tensor_cores || word;
    }
  }
  return device;
}

Status QueryDevice(DeviceInfo* device) {
#ifdef BITNET_EMULATION
  *device = MakeDeviceInfo("Emulated RTX", 75, 4);
  return Status::kOk;
#else
  int index = 0;
  cudaDeviceProp properties;
  cudaError_t error = cudaGetDevice(&index);
  if (error == cudaSuccess) error = cudaGetDeviceProperties(&properties, index);
  if (error == cudaErrorInsufficientDriver) return Status::kDriverTooOld;
  if (error != cudaSuccess) return Status::kNoDevice;
  *device = MakeDeviceInfo(properties.name, 10 * properties.major + properties.minor,
                           properties.multiProcessorCount);
  return Status::kOk;
#endif
}

Status CheckShape(const TernaryMatMulShape& s) {
  if (s.m < 1 || s.k < 1 || s.k > kMaxK || s.n < 1 || s.n > kMaxN) return Status::kInvalidShape;
  if (s.group_size < 0) return Status::kInvalidShape;
  if (s.activation_bits != 8 && s.activation_bits != 0) return Status::kInvalidShape;
  if (s.group_size && s.k % s.group_size) return Status::kInvalidShape;
  const int64_t scales = int64_t{s.n} * Units(s);
  const bool one = s.scale_count == 1 && !s.group_size;
  if (!one && s.scale_count != scales) return Status::kInvalidShape;
  // Kernels step through outputs, scales and chunks of w in 32 bits.
  const int64_t chunks = int64_t{s.n} * Chunks(s.k);
  if (scales > INT32_MAX || chunks > INT32_MAX) return Status::kInvalidShape;
  return Status::kOk;
}

bool Supports(KernelFamily family, const TernaryMatMulShape& s, DType type,
              const DeviceInfo& device) {
  if (CheckShape(s) != Status::kOk || device.sm < 75 || device.sm_count < 1) return false;
  if (family == KernelFamily::kAuto || family == KernelFamily::kNaive) return true;
  const bool grouped = Units(s) > 1;
  const auto groups_of = [&](int32_t multiple) {
    return !grouped || (s.group_size % multiple == 0 && Units(s) <= kMaxUnits);
  };
  const bool fits_grid = s.m <= 65535 * 16;  // blocks along y, of 16 rows or more
  switch (family) {
    case KernelFamily::kGemvDp4a:
      return s.activation_bits == 8 && s.m <= kMaxGemvColumns && groups_of(32);
    case KernelFamily::kTileDp4a: return s.activation_bits == 8 && fits_grid && groups_of(16);
    case KernelFamily::kTileImma:
      return s.activation_bits == 8 && fits_grid && groups_of(64) && device.real_tensor_cores;
    case KernelFamily::kGemvFloat:
      return s.activation_bits == 0 && s.m <= kMaxGemvColumns && groups_of(32);
    case KernelFamily::kTileFloat: return s.activation_bits == 0 && fits_grid && groups_of(16);
    case KernelFamily::kTileHmma:
      return s.activation_bits == 0 && type == DType::kFloat16 && fits_grid && groups_of(64) &&
             device.real_tensor_cores;
    default: return false;
  }
}

KernelFamily ChooseFamily(const TernaryMatMulShape& s, DType type, const DeviceInfo& device) {
  // With tensor cores a tile overtakes the GEMV, whose work grows with every column, near M = 4;
  // without, the GEMV stays bound by reading weights up to M = 8 (int8), or about 4 (fp32).
  const int32_t gemv_m = device.real_tensor_cores || s.activation_bits == 0 ? 4 : kMaxGemvColumns;
  const KernelFamily gemv = s.activation_bits ? KernelFamily::kGemvDp4a : KernelFamily::kGemvFloat;
  if (s.m <= gemv_m && Supports(gemv, s, type, device)) return gemv;
  const KernelFamily order[] = {KernelFamily::kTileImma, KernelFamily::kTileHmma,
                                KernelFamily::kTileDp4a, KernelFamily::kTileFloat};
  for (const KernelFamily family : order) {
    if (Supports(family, s, type, device)) return family;
  }
  return KernelFamily::kNaive;
}

size_t WorkspaceBytes(const TernaryMatMulShape& s) {
  if (CheckShape(s) != Status::kOk) return 0;
  // A block sums 64 x 64 outputs at most, and there are never more than MaxSplits copies of the
  // outputs. Grows with m.
  const int64_t rows = s.m < kMaxSplitM ? s.m : kMaxSplitM;
  const int64_t by_blocks = kMaxSplitBlocks * kTileN * 64;
  const int64_t by_outputs = MaxSplits(s) < 2 ? 0 : MaxSplits(s) * rows * s.n;
  const int64_t sums = by_blocks < by_outputs ? by_blocks : by_outputs;
  return LayOut(s, static_cast<size_t>(sums) * sizeof(float)).end;
}

Status Launch(KernelFamily family, const TernaryMatMulShape& s, DType type,
              const TernaryMatMulArgs& args, const DeviceInfo& device, Stream stream) {
  if (const Status status = CheckShape(s); status != Status::kOk) return status;
  if (!Supports(family, s, type, device)) return Status::kUnsupported;
  if (family == KernelFamily::kAuto) family = ChooseFamily(s, type, device);

  Params p = MakeParams(s, type, args);
  const SplitPlan plan = PlanSplits(family, s, device);
  p.splits = plan.splits;
  p.chunks_per_split = plan.chunks_per_split;
  const size_t partial_bytes = p.splits > 1 ? size_t{4} * p.splits * s.m * s.n : 0;
  const bool quantize =
      p.quantized && family != KernelFamily::kNaive && !QuantizesInside(family, s);
  const Layout layout = LayOut(s, partial_bytes);
  const size_t needed = quantize || partial_bytes ? layout.end : 0;
  if (const Status status = CheckArgs(args, needed); status != Status::kOk) return status;

  char* workspace = static_cast<char*>(args.workspace);
  if (quantize) {
    p.xq = reinterpret_cast<uint32_t*>(workspace + layout.xq);
    p.row_scale = reinterpret_cast<float*>(workspace + layout.row_scale);
    p.unit_sum = reinterpret_cast<int32_t*>(workspace + layout.unit_sum);
    if (const Status status = LaunchQuantize(p, type, stream); status != Status::kOk) return status;
  }
  if (partial_bytes) p.partial = workspace + layout.partial;
  if (const Status status = LaunchFamily(family, p, type, device, stream); status != Status::kOk)
    return status;
  return p.splits > 1 ? LaunchSumSplits(p, type, stream) : Status::kOk;
}

const char* StatusString(Status status) {
  switch (status) {
    case Status::kOk: return "ok";
    case Status::kInvalidShape: return "invalid shape";
    case Status::kInvalidArgument: return "a required pointer is null";
    case Status::kMisaligned: return "packed_weight or workspace is misaligned";
    case Status::kWorkspaceTooSmall: return "workspace too small";
    case Status::kUnsupported: return "not supported by this kernel family";
    case Status::kLaunchFailed: return "CUDA refused the launch";
    case Status::kNoDevice: return "no CUDA device answers";
    case Status::kDriverTooOld:
      return "there is no NVIDIA driver, or it is older than the CUDA runtime in this library";
  }
  return "unknown status";
}

const char* FamilyName(KernelFamily family) {
  switch (family) {
    case KernelFamily::kAuto: return "auto";
    case KernelFamily::kGemvDp4a: return "gemv_dp4a";
    case KernelFamily::kTileDp4a: return "tile_dp4a";
    case KernelFamily::kTileImma: return "tile_imma";
    case KernelFamily::kGemvFloat: return "gemv_float";
    case KernelFamily::kTileFloat: return "tile_float";
    case KernelFamily::kTileHmma: return "tile_hmma";
    case KernelFamily::kNaive: return "naive";
  }
  return "unknown";
}

}  // namespace bitnet
