// The launch interface as plain C functions, for gpu_check's Python through ctypes.
#include "ternary_matmul.h"

using namespace bitnet;

extern "C" {

// device[3]: sm, multiprocessors, real tensor cores. Returns a Status.
int bitnet_query_device(int* device) {
  DeviceInfo info;
  const Status status = QueryDevice(&info);
  device[0] = info.sm;
  device[1] = info.sm_count;
  device[2] = info.real_tensor_cores;
  return static_cast<int>(status);
}

static TernaryMatMulShape ShapeOf(const int* s) { return {s[0], s[1], s[2], s[3], s[4], s[5]}; }
static DeviceInfo DeviceOf(const int* d) { return {d[0], d[1], d[2] != 0}; }

// shape[6] as in TernaryMatMulShape; type as in DType.
int bitnet_supports(int family, const int* shape, int type, const int* device) {
  return Supports(static_cast<KernelFamily>(family), ShapeOf(shape), static_cast<DType>(type),
                  DeviceOf(device));
}

size_t bitnet_workspace_bytes(const int* shape) { return WorkspaceBytes(ShapeOf(shape)); }

// pointers[6]: x, packed_weight, scale, bias, y, workspace. Returns a Status.
int bitnet_launch(int family, const int* shape, int type, void* const* pointers,
                  size_t workspace_bytes, const int* device, void* stream) {
  TernaryMatMulArgs args;
  args.x = pointers[0];
  args.packed_weight = static_cast<const uint32_t*>(pointers[1]);
  args.scale = static_cast<const float*>(pointers[2]);
  args.bias = static_cast<const float*>(pointers[3]);
  args.y = pointers[4];
  args.workspace = pointers[5];
  args.workspace_bytes = workspace_bytes;
  return static_cast<int>(Launch(static_cast<KernelFamily>(family), ShapeOf(shape),
                                 static_cast<DType>(type), args, DeviceOf(device),
                                 static_cast<Stream>(stream)));
}

const char* bitnet_status_string(int status) { return StatusString(static_cast<Status>(status)); }
const char* bitnet_family_name(int family) { return FamilyName(static_cast<KernelFamily>(family)); }
int bitnet_kernel_version() { return kKernelVersion; }

}  // extern "C"
