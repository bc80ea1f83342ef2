// The rules: up to 8 rows a GEMV, above a tile; tensor-core families only where the device's
// tensor cores are real. Enough like the real ones for the plugin's choices to be visible.

#include "recording_kernels.h"

namespace bitnet {

using recording::TheState;

Status QueryDevice(DeviceInfo* device) {
  ++TheState().queries;
  *device = TheState().device;
  return TheState().query_status;
}

Status CheckShape(const TernaryMatMulShape& shape) {
  const bool good = shape.m > 0 && shape.k > 0 && shape.n > 0 && shape.group_size >= 0;
  return good ? Status::kOk : Status::kInvalidShape;
}

bool Supports(KernelFamily family, const TernaryMatMulShape& shape, DType,
              const DeviceInfo& device) {
  const bool quantized = shape.activation_bits == 8;
  switch (family) {
    case KernelFamily::kAuto:
    case KernelFamily::kNaive: return true;
    case KernelFamily::kGemvDp4a: return quantized && shape.m <= 8;
    case KernelFamily::kTileDp4a: return quantized;
    case KernelFamily::kTileImma: return quantized && device.real_tensor_cores;
    case KernelFamily::kGemvFloat: return !quantized && shape.m <= 8;
    case KernelFamily::kTileFloat: return !quantized;
    case KernelFamily::kTileHmma: return !quantized && device.real_tensor_cores;
  }
  return false;
}

KernelFamily ChooseFamily(const TernaryMatMulShape& shape, DType, const DeviceInfo& device) {
  if (shape.activation_bits != 8) {
    return shape.m <= 8 ? KernelFamily::kGemvFloat : KernelFamily::kTileFloat;
  }
  if (shape.m <= 8) return KernelFamily::kGemvDp4a;
  return device.real_tensor_cores ? KernelFamily::kTileImma : KernelFamily::kTileDp4a;
}

size_t WorkspaceBytes(const TernaryMatMulShape& shape) {
  return static_cast<size_t>(shape.m) * 1000;
}

Status Launch(KernelFamily family, const TernaryMatMulShape& shape, DType type,
              const TernaryMatMulArgs& args, const DeviceInfo&, Stream stream) {
  ++TheState().launches;
  TheState().last = {family, shape, type, args, stream};
  return TheState().launch_status;
}

const char* StatusString(Status) { return "the recorded status"; }
const char* FamilyName(KernelFamily) { return "the recorded family"; }

}  // namespace bitnet
