// The launch interface of the TernaryMatMul kernels: y[M, N] = x[M, K] . w[N, K]^T * scale + bias
// with ternary w (docs/kernels.md has the arithmetic and the choice of kernel).
//
// Plain C++17 with no CUDA header, so that the TensorRT plugin, the GPU check and the host
// emulation share it. Nothing behind it keeps state, allocates, synchronizes or prints: every
// call is re-entrant and may be recorded into a CUDA graph. What cannot be computed is refused
// with a Status, never computed wrongly.
//
// Not here: kernels (*.cu beside this file), TensorRT (../tensorrt).
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;  // what cudaStream_t points to

namespace bitnet {

using Stream = CUstream_st*;  // the same type as cudaStream_t

// Raised whenever a kernel's speed or result may change; part of TensorRT's timing cache key.
inline constexpr int32_t kKernelVersion = 4;

// The largest K: a lane that had to sum a whole row alone would still keep its accumulator,
// whose terms reach 3 * 4^3 * 128 = 24576 and of which it sees every fourth, inside int32.
inline constexpr int32_t kMaxK = 1 << 18;
static_assert(int64_t{kMaxK} / 4 * (3 * 64 * 128) < (int64_t{1} << 31), "accumulator overflow");

inline constexpr int32_t kMaxN = 1 << 30;  // outputs; n * K'/64 and the scales stay below 2^31

// Every launch wants its workspace and packed_weight aligned to this many bytes.
inline constexpr size_t kWorkspaceAlignment = 256;
inline constexpr size_t kWeightAlignment = 16;

enum class Status : int32_t {
  kOk = 0,
  kInvalidShape = 1,       // a size is not positive, too large, or does not fit the others
  kInvalidArgument = 2,    // a pointer is null that must not be
  kMisaligned = 3,         // packed_weight or workspace is not aligned as said above
  kWorkspaceTooSmall = 4,  // workspace_bytes < WorkspaceBytes(...)
  kUnsupported = 5,        // this family cannot run this shape, type or device
  kLaunchFailed = 6,       // CUDA refused the launch; cudaPeekAtLastError() has its reason
  kNoDevice = 7,           // no CUDA device answers
  kDriverTooOld = 8,       // no driver, or one older than the CUDA runtime linked in here
};

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1 };

// The kernel families. The values are the plugin's TensorRT tactic ids: unique, non-zero, and
// never reused for another kernel. kAuto chooses by M, type and device.
enum class KernelFamily : int32_t {
  kAuto = 0,
  kGemvDp4a = 1,   // activation_bits 8, M <= 8: dp4a, activations quantized in the kernel
  kTileDp4a = 2,   // activation_bits 8: tiles by dp4a, any M
  kTileImma = 3,   // activation_bits 8: tiles by int8 tensor cores, any M
  kGemvFloat = 4,  // activation_bits 0, M <= 8: weights decoded to fp32, fp32 sums
  kTileFloat = 5,  // activation_bits 0: tiles by fp32 FMA, any M
  kTileHmma = 6,   // activation_bits 0, fp16 x: tiles by fp16 tensor cores, fp32 sums
  kNaive = 7,      // the GPU-side reference: every legal shape, one thread an output, slow
};

inline constexpr KernelFamily kFamilies[] = {
    KernelFamily::kGemvDp4a,  KernelFamily::kTileDp4a, KernelFamily::kTileImma,
    KernelFamily::kGemvFloat, KernelFamily::kTileFloat, KernelFamily::kTileHmma,
    KernelFamily::kNaive,
};

struct TernaryMatMulShape {
  int32_t m = 0;                // rows of x, all leading dimensions multiplied; 1 or more
  int32_t k = 0;                // 1..kMaxK; rows of packed_weight hold K' = k rounded up to 64
  int32_t n = 0;                // outputs, 1..kMaxN
  int32_t group_size = 0;       // 0, or a divisor of k: scale is then [n, k / group_size]
  int32_t activation_bits = 8;  // 8: per-row absmax int8; 0: float activations
  int32_t scale_count = 1;      // elements of scale: 1, n, or n * (k / group_size)
};

struct TernaryMatMulArgs {
  const void* x = nullptr;                  // [m, k] of the launch's DType
  const uint32_t* packed_weight = nullptr;  // [n, K'/16] words of 16 codes, code = w + 2
  const float* scale = nullptr;             // [scale_count]
  const float* bias = nullptr;              // [n], or null
  void* y = nullptr;                        // [m, n] of the launch's DType
  void* workspace = nullptr;                // may be null where WorkspaceBytes(...) is 0
  size_t workspace_bytes = 0;
};

struct DeviceInfo {
  int32_t sm = 0;                  // compute capability, e.g. 75
  int32_t sm_count = 0;            // multiprocessors
  bool real_tensor_cores = false;  // false on GTX 16: it accepts mma, but runs it very slowly
};

// Pure function of what the driver reports, so that it can be tested without a card. Compute
// capability 7.5 alone does not say whether tensor cores are real; the name does.
DeviceInfo MakeDeviceInfo(const char* name, int32_t sm, int32_t sm_count);

// The current CUDA device. kNoDevice or kDriverTooOld where there is none. Emulated builds answer a fixed
// small Turing card with real tensor cores.
Status QueryDevice(DeviceInfo* device);

// kOk if the shape is one the op allows, whatever the family.
Status CheckShape(const TernaryMatMulShape& shape);

// Whether the family runs this shape on this device. kAuto and kNaive run every legal shape.
// Speed is no part of it, except that tensor-core families want real tensor cores.
bool Supports(KernelFamily family, const TernaryMatMulShape& shape, DType type,
              const DeviceInfo& device);

// The family kAuto stands for. Never kAuto; kNaive only where nothing else runs the shape.
KernelFamily ChooseFamily(const TernaryMatMulShape& shape, DType type, const DeviceInfo& device);

// Bytes of workspace that suffice for every family, type and device, and for every m up to
// shape.m. 0 for a shape that CheckShape refuses. TensorRT asks for it once, where an engine is
// built, and the engine may run on a card with more multiprocessors. Where a change makes it grow,
// raise kSerializationVersion (../tensorrt/fields.h) too: stored engines have the old one.
size_t WorkspaceBytes(const TernaryMatMulShape& shape);

// Enqueues the kernels on stream. Returns before they ran.
Status Launch(KernelFamily family, const TernaryMatMulShape& shape, DType type,
              const TernaryMatMulArgs& args, const DeviceInfo& device, Stream stream);

const char* StatusString(Status status);      // e.g. "workspace too small"
const char* FamilyName(KernelFamily family);  // e.g. "gemv_dp4a"

}  // namespace bitnet
