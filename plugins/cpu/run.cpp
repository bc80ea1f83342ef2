// The entry points that run a product: they check their arguments, lay out the workspace and
// call the kernels of the path the weights were repacked for.
#include "internal.h"

namespace bitnet_cpu {
namespace {

constexpr size_t kAlignment = 64;

size_t align_up(size_t n) { return (n + kAlignment - 1) / kAlignment * kAlignment; }

// Rows start on cache lines; an odd number of lines keeps rows from sharing the L1 cache's sets.
int64_t row_bytes(const bitnet_cpu_weights& w) {
  const size_t element = w.activation_bits ? 1 : sizeof(float);
  const size_t bytes = align_up(size_t(w.steps() * kStep) * element);
  return int64_t(bytes / kAlignment % 2 ? bytes : bytes + kAlignment);
}

Workspace carve(const bitnet_cpu_weights& w, int64_t M, const void* memory) {
  auto* base = static_cast<uint8_t*>(const_cast<void*>(memory));
  base += align_up(reinterpret_cast<uintptr_t>(base)) - reinterpret_cast<uintptr_t>(base);
  Workspace ws;
  ws.row_bytes = row_bytes(w);
  ws.x = base;
  ws.a = reinterpret_cast<float*>(base + M * ws.row_bytes);
  ws.sums = reinterpret_cast<int32_t*>(ws.a + M);
  return ws;
}

bool is_type(bitnet_cpu_type type) {
  return type == BITNET_CPU_FLOAT32 || type == BITNET_CPU_FLOAT16;
}

bool is_range(int64_t begin, int64_t end, int64_t size) {
  return 0 <= begin && begin <= end && end <= size;
}

}  // namespace
}  // namespace bitnet_cpu

using namespace bitnet_cpu;

int64_t bitnet_cpu_panel_width(const bitnet_cpu_weights*) { return kPanel; }

int64_t bitnet_cpu_panels(const bitnet_cpu_weights* w) { return w ? w->panels : 0; }

size_t bitnet_cpu_weight_bytes(const bitnet_cpu_weights* w) { return w ? w->bytes : 0; }

const char* bitnet_cpu_path(const bitnet_cpu_weights* w) { return w ? w->kernels->name : ""; }

size_t bitnet_cpu_workspace_bytes(const bitnet_cpu_weights* w, int64_t M) {
  if (!w || M < 0) return 0;
  const size_t row = size_t(row_bytes(*w)) + sizeof(float) + size_t(w->groups) * sizeof(int32_t);
  return size_t(M) * row + kAlignment;
}

bitnet_cpu_status bitnet_cpu_prepare(const bitnet_cpu_weights* w, const void* x,
                                     bitnet_cpu_type type, int64_t M, int64_t row_begin,
                                     int64_t row_end, void* workspace) {
  if (!w || !is_type(type) || !is_range(row_begin, row_end, M)) return BITNET_CPU_INVALID_ARGUMENT;
  if (row_begin == row_end) return BITNET_CPU_OK;
  if (!x || !workspace) return BITNET_CPU_INVALID_ARGUMENT;
  const auto convert = w->activation_bits ? w->kernels->quantize : w->kernels->to_float;
  convert(*w, carve(*w, M, workspace), x, type == BITNET_CPU_FLOAT16, row_begin, row_end);
  return BITNET_CPU_OK;
}

bitnet_cpu_status bitnet_cpu_multiply(const bitnet_cpu_weights* w, const void* workspace,
                                      int64_t M, int64_t row_begin, int64_t row_end,
                                      int64_t panel_begin, int64_t panel_end, void* y,
                                      bitnet_cpu_type type) {
  if (!w || !is_type(type) || !is_range(row_begin, row_end, M) ||
      !is_range(panel_begin, panel_end, w->panels))
    return BITNET_CPU_INVALID_ARGUMENT;
  if (row_begin == row_end || panel_begin == panel_end) return BITNET_CPU_OK;
  if (!workspace || !y) return BITNET_CPU_INVALID_ARGUMENT;
  const auto multiply = w->activation_bits ? w->kernels->multiply_int8 : w->kernels->multiply_float;
  const Tile tile{row_begin, row_end, panel_begin, panel_end, y, type == BITNET_CPU_FLOAT16};
  multiply(*w, carve(*w, M, workspace), tile);
  return BITNET_CPU_OK;
}

const char* bitnet_cpu_status_string(bitnet_cpu_status status) {
  switch (status) {
    case BITNET_CPU_OK: return "no error";
    case BITNET_CPU_INVALID_ARGUMENT:
      return "an argument or attribute is out of its range: K must be 1 to 8388608, N at least "
             "1, group_size 0 or a divisor of K, activation_bits 0 or 8";
    case BITNET_CPU_BAD_SHAPE:
      return "packed_weight must be [N, K'/4] bytes with K' = K rounded up to 64, and scale [1], "
             "[N], or [N, K/group_size] when group_size is set; export the model again";
    case BITNET_CPU_CORRUPT_WEIGHTS:
      return "packed_weight holds code 0, which stands for no trit: the file is corrupt";
    case BITNET_CPU_OUT_OF_MEMORY: return "out of memory";
    case BITNET_CPU_UNKNOWN_PATH:
      return "BITNET_CPU_PATH names no instruction path of this build; unset it, or use "
             "portable, avx2, avxvnni, avx512vnni or (64-bit ARM) neon";
    case BITNET_CPU_UNSUPPORTED_PATH:
      return "BITNET_CPU_PATH names an instruction path this processor cannot run; unset it";
  }
  return "unknown status";
}
