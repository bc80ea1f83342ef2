// The loops around the inner kernels, the same for every instruction path: blocks of rows, panels
// of outputs, groups and chunks of inputs; and the last step from integer sums to Y.
//
// Each kernels_*.cpp includes this with its own `Isa`, compiled with its own flags. Everything has
// internal linkage and uses no standard-library template, for the reason half.h gives.
//
// Isa gives: kRows (most rows of one tile), kEvenTiles (8 rows in tiles of 6 are 4 + 4, else
// 6 + 2), kTilePanels (most panels of one tile: 1 or 2),
// kChunkSteps (most steps of one call of a tile), kGemvSteps (the same for gemv); products<First>
// and gemv, for every number of panels, float_tile, store_half.
#ifndef BITNET_CPU_BLOCKING_H_
#define BITNET_CPU_BLOCKING_H_

#include <string.h>

#include "internal.h"

namespace bitnet_cpu {
namespace {

// Rows that share one unpacking of a chunk: 32 x 256 bytes of activations stay in the L1 cache.
constexpr int64_t kRowBlock = 32;

// The codes of a tile: as many steps of P panels, which lie `bytes` apart.
template <int P>
struct Packed {
  const uint8_t* first;
  int64_t bytes;
  BITNET_CPU_INLINE const uint8_t* panel(int i) const { return first + i * bytes; }
};

// Sums of a tile's panel i begin here: sums are [panels, kRowBlock, 16].
constexpr int64_t kPanelSums = kRowBlock * kPanel;

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// Calls f(begin, end) for pieces of [begin, end) no longer than `most`, as equal as can be.
template <class F>
inline void for_each_piece(int64_t begin, int64_t end, int64_t most, F f) {
  const int64_t pieces = (end - begin + most - 1) / most;
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t next = begin + (end - begin) / (pieces - i);
    f(begin, next);
    begin = next;
  }
}

// Writes values [rows, 16] to Y from row `row` on at the columns of panel p, of which the last
// panel may have fewer than 16.
template <class Isa>
inline void store_panel(const bitnet_cpu_weights& w, const Tile& tile, int64_t row, int64_t rows,
                        int64_t p, const float* values) {
  const int64_t column = p * kPanel, n = min64(kPanel, w.N - column);
  for (int64_t r = 0; r < rows; ++r, values += kPanel) {
    const int64_t offset = (row + r) * w.N + column;
    if (!tile.half) {
      float* y = static_cast<float*>(tile.y) + offset;
      if (n == kPanel)  // a known size: a few moves instead of a call
        memcpy(y, values, kPanel * sizeof(float));
      else
        memcpy(y, values, size_t(n) * sizeof(float));
      continue;
    }
    uint16_t half[kPanel];
    Isa::store_half(values, half);
    memcpy(static_cast<uint16_t*>(tile.y) + offset, half, size_t(n) * sizeof(uint16_t));
  }
}

// Fetches the lines of Y that a panel will fill, one in each row, while it is computed: no
// processor foresees writes that far apart (worth 5-8 % from some 60 rows of 1000 on).
inline void prefetch_panel(const bitnet_cpu_weights& w, const Tile& tile, int64_t row,
                           int64_t rows, int64_t p) {
  const int64_t element = tile.half ? 2 : 4;
  const char* y = static_cast<const char*>(tile.y) + (row * w.N + p * kPanel) * element;
  for (int64_t r = 0; r < rows; ++r) __builtin_prefetch(y + r * w.N * element, 1);
}

// y [rows, 16] = (sums * scale) * a + bias, in this order, each step rounded to float32. y may
// be a part of Y itself, with rows `stride` apart.
inline void finish(const bitnet_cpu_weights& w, const Workspace& ws, int64_t row, int64_t rows,
                   int64_t p, const int32_t* sums, float* __restrict__ y, int64_t stride) {
  const float* a = ws.a + row;
  const int32_t* offset = ws.sums + row;  // codes are w + 1: one sum of activations too much
  const float* scale = w.panel_scale(0, p);
  const float* bias = w.bias + p * kPanel;
  for (int64_t r = 0; r < rows; ++r, sums += kPanel, y += stride) {
    for (int j = 0; j < kPanel; ++j)
      y[j] = float(sums[j] - offset[r]) * scale[j] * a[r] + bias[j];
  }
}

// total [rows, 16] (+)= sums * scale, for group g of several.
inline void add_group(const bitnet_cpu_weights& w, const Workspace& ws, int64_t row, int64_t rows,
                      int64_t p, int64_t g, const int32_t* sums, float* __restrict__ total) {
  const float* scale = w.panel_scale(g, p);
  for (int64_t r = 0; r < rows; ++r, sums += kPanel, total += kPanel) {
    const int32_t offset = ws.sums[(row + r) * w.groups + g];
    for (int j = 0; j < kPanel; ++j)
      total[j] = (g ? total[j] : 0.0f) + float(sums[j] - offset) * scale[j];
  }
}

// y [rows, 16] = total * a + bias, in place.
inline void finish_groups(const bitnet_cpu_weights& w, const Workspace& ws, int64_t row,
                          int64_t rows, int64_t p, float* total) {
  const float* bias = w.bias + p * kPanel;
  for (int64_t r = 0; r < rows; ++r, total += kPanel) {
    for (int j = 0; j < kPanel; ++j) total[j] = total[j] * ws.a[row + r] + bias[j];
  }
}

// sums [P, kRowBlock, 16] += the products of rows [row_begin, row_end) with steps [begin, end) of
// the P panels from p on.
template <class Isa, int P>
inline void add_products(const bitnet_cpu_weights& w, const Workspace& ws, int64_t row_begin,
                         int64_t row_end, int64_t p, int64_t begin, int64_t end,
                         uint8_t* unpacked, int32_t* sums) {
  const uint8_t* x = ws.x + row_begin * ws.row_bytes;
  const auto codes = [&](int64_t t) {
    return Packed<P>{w.panel(p) + t * kStepBytes, w.steps() * kStepBytes};
  };
  if (row_end - row_begin == 1) {
    for_each_piece(begin, end, Isa::kGemvSteps, [&](int64_t t0, int64_t t1) {
      Isa::gemv(x + t0 * kStep, codes(t0), t1 - t0, sums);
    });
    return;
  }
  for_each_piece(begin, end, Isa::kChunkSteps, [&](int64_t t0, int64_t t1) {
    const auto tile = [&](int64_t r0, int64_t r1) {
      const uint8_t* rows = x + r0 * ws.row_bytes + t0 * kStep;
      if (r0 == 0)
        Isa::template products<true>(int(r1 - r0), rows, ws.row_bytes, codes(t0), t1 - t0,
                                     unpacked, sums);
      else
        Isa::template products<false>(int(r1 - r0), rows, ws.row_bytes, codes(t0), t1 - t0,
                                      unpacked, sums + r0 * kPanel);
    };
    const int64_t rows = row_end - row_begin;
    if (Isa::kEvenTiles) return for_each_piece(0, rows, Isa::kRows, tile);
    for (int64_t r = 0; r < rows; r += Isa::kRows) tile(r, min64(r + Isa::kRows, rows));
  });
}

// Y's rows [r0, r1) of the P panels from p on.
template <class Isa, int P>
inline void multiply_panels(const bitnet_cpu_weights& w, const Workspace& ws, const Tile& tile,
                            int64_t r0, int64_t r1, int64_t p, uint8_t* unpacked) {
  alignas(64) int32_t sums[P * kPanelSums];
  alignas(64) float values[P * kPanelSums];
  const int64_t rows = r1 - r0;
  for (int i = 0; i < P && rows > 1; ++i) prefetch_panel(w, tile, r0, rows, p + i);
  for (int64_t g = 0; g < w.groups; ++g) {
    for (int i = 0; i < P; ++i)
      memset(sums + i * kPanelSums, 0, size_t(rows * kPanel) * sizeof(int32_t));
    add_products<Isa, P>(w, ws, r0, r1, p, g * w.group_steps, (g + 1) * w.group_steps, unpacked,
                         sums);
    for (int i = 0; i < P && w.groups > 1; ++i)
      add_group(w, ws, r0, rows, p + i, g, sums + i * kPanelSums, values + i * kPanelSums);
  }
  for (int i = 0; i < P; ++i) {
    float* panel_values = values + i * kPanelSums;
    if (w.groups > 1) {
      finish_groups(w, ws, r0, rows, p + i, panel_values);
    } else if (!tile.half && (p + i + 1) * kPanel <= w.N) {  // straight into Y
      float* y = static_cast<float*>(tile.y) + r0 * w.N + (p + i) * kPanel;
      finish(w, ws, r0, rows, p + i, sums + i * kPanelSums, y, w.N);
      continue;
    } else {
      finish(w, ws, r0, rows, p + i, sums + i * kPanelSums, panel_values, kPanel);
    }
    store_panel<Isa>(w, tile, r0, rows, p + i, panel_values);
  }
}

template <class Isa>
void multiply_int8(const bitnet_cpu_weights& w, const Workspace& ws, const Tile& tile) {
  alignas(64) uint8_t unpacked[Isa::kTilePanels * Isa::kChunkSteps * kStepBytes * 4];
  for_each_piece(tile.row_begin, tile.row_end, kRowBlock, [&](int64_t r0, int64_t r1) {
    int64_t p = tile.panel_begin;
    for (; p + Isa::kTilePanels <= tile.panel_end; p += Isa::kTilePanels)
      multiply_panels<Isa, Isa::kTilePanels>(w, ws, tile, r0, r1, p, unpacked);
    if constexpr (Isa::kTilePanels == 2)  // an odd one is left
      if (p < tile.panel_end) multiply_panels<Isa, 1>(w, ws, tile, r0, r1, p, unpacked);
  });
}

// activation_bits = 0: y = sum_g scale_g * sum_k x w + bias, all in float32.
template <class Isa>
void multiply_float(const bitnet_cpu_weights& w, const Workspace& ws, const Tile& tile) {
  alignas(64) float sums[Isa::kFloatRows * kPanel];
  alignas(64) float total[Isa::kFloatRows * kPanel];
  for_each_piece(tile.row_begin, tile.row_end, Isa::kFloatRows, [&](int64_t r0, int64_t r1) {
    const int rows = int(r1 - r0);
    for (int64_t p = tile.panel_begin; p < tile.panel_end; ++p) {
      const float* bias = w.bias + p * kPanel;
      for (int64_t g = 0; g < w.groups; ++g) {
        const int64_t t = g * w.group_steps;
        const uint8_t* x = ws.x + r0 * ws.row_bytes + t * kStep * int64_t(sizeof(float));
        const float* scale = w.panel_scale(g, p);
        Isa::float_tile(rows, x, ws.row_bytes, w.panel(p) + t * kStepBytes, w.group_steps, sums);
        for (int64_t i = 0; i < rows * kPanel; ++i)
          total[i] = (g ? total[i] : 0.0f) + sums[i] * scale[i % kPanel];
      }
      for (int64_t i = 0; i < rows * kPanel; ++i) total[i] += bias[i % kPanel];
      store_panel<Isa>(w, tile, r0, rows, p, total);
    }
  });
}

}  // namespace
}  // namespace bitnet_cpu

#endif  // BITNET_CPU_BLOCKING_H_
