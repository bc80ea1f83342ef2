// How one product is cut into tasks for ONNX Runtime's thread pool, whose size the session sets.
#ifndef BITNET_ORT_PARALLEL_H_
#define BITNET_ORT_PARALLEL_H_

#include <algorithm>
#include <cstdint>

namespace bitnet_ort {

// A task should take some 10 microseconds, a few times what handing it to a thread costs.
constexpr int64_t kTaskProducts = int64_t{1} << 20;
constexpr int64_t kTaskInputs = int64_t{1} << 15;  // of quantizing
constexpr int64_t kTaskRows = 32;                  // fewer would share an unpacking of weights less

// Y cut into row_parts x panel_parts rectangles.
struct Grid {
  int64_t row_parts, panel_parts;

  static Grid of(int64_t M, int64_t K, int64_t N, int64_t panels) {
    const int64_t wanted = std::max<int64_t>(1, M * N / kTaskProducts * K +
                                                    M * N % kTaskProducts * K / kTaskProducts);
    const int64_t panel_parts = std::min(panels, wanted);
    const int64_t row_blocks = (M + kTaskRows - 1) / kTaskRows;
    return {std::min(row_blocks, (wanted + panel_parts - 1) / panel_parts), panel_parts};
  }
  int64_t tasks() const { return row_parts * panel_parts; }
};

// The part-th of `parts` nearly equal pieces of [0, size) begins here.
inline int64_t piece_begin(int64_t size, int64_t parts, int64_t part) {
  return size / parts * part + std::min(part, size % parts);
}

}  // namespace bitnet_ort

#endif  // BITNET_ORT_PARALLEL_H_
