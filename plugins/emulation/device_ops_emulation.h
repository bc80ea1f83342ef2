// The instructions that kernels/device_ops.cuh wraps, for the host emulation: mixed-sign dp4a and
// the two tensor-core products with the lane layout that the PTX manual gives for their
// fragments, so that a kernel which loads a fragment wrongly computes wrongly here too.
#pragma once

#include "cuda_emulation.h"
#include "ternary_matmul.h"

namespace bitnet {

#define BITNET_SHARED(type, name) type* name = static_cast<type*>(bitnet_emulation::SharedMemory())

inline int FreshThreadIndex() { return static_cast<int>(threadIdx.x); }

inline uint32_t MaskOr(uint32_t word, uint32_t mask, uint32_t bits) { return (word & mask) | bits; }

inline uint4 LoadStreaming(const uint4* address) { return *address; }

inline int32_t Dp4a(uint32_t codes, uint32_t x, int32_t sum) {
  // Unsigned arithmetic: the hardware wraps where signed C++ would be undefined.
  uint32_t total = static_cast<uint32_t>(sum);
  for (int byte = 0; byte < 4; ++byte) {
    const uint32_t code = codes >> 8 * byte & 255;
    total += code * static_cast<uint32_t>(static_cast<int8_t>(x >> 8 * byte & 255));
  }
  return static_cast<int32_t>(total);
}

struct MmaU8S8Lane {
  int32_t c[2];
  uint32_t a, b;
};

// mma.m8n8k16: lane l holds A[l/4][4(l%4)..+3], B[4(l%4)..+3][l/4], C[l/4][2(l%4)..+1].
inline void MmaU8S8Warp(const unsigned char* in, unsigned char* out) {
  MmaU8S8Lane lanes[32];
  for (int l = 0; l < 32; ++l)
    std::memcpy(&lanes[l], in + l * kSlotBytes, sizeof lanes[l]);
  for (int l = 0; l < 32; ++l) {
    for (int j = 0; j < 2; ++j) {
      const int row = l / 4, col = 2 * (l % 4) + j;
      int32_t sum = lanes[l].c[j];
      for (int quad = 0; quad < 4; ++quad)
        sum = Dp4a(lanes[4 * row + quad].a, lanes[4 * col + quad].b, sum);
      std::memcpy(out + l * kSlotBytes + 4 * j, &sum, 4);
    }
  }
}

inline void MmaU8S8(int32_t (&c)[2], uint32_t a, uint32_t b) {
  const MmaU8S8Lane lane{{c[0], c[1]}, a, b};
  bitnet_emulation::WarpOperation("mma.u8.s8", &lane, sizeof lane, c, sizeof c, MmaU8S8Warp);
}

struct MmaF16Lane {
  float c[4];
  uint32_t a[2], b;
};

inline float HalfOf(uint32_t pair, int index) {
  return HalfBitsToFloat(static_cast<uint16_t>(pair >> 16 * index));
}

// mma.m16n8k8: lane l holds A[l/4 + 8r][2(l%4)..+1] in a[r], B[2(l%4)..+1][l/4],
// C[l/4 + 8r][2(l%4)..+1] in c[2r..+1]. The order of the eight additions is the hardware's own.
inline void MmaF16Warp(const unsigned char* in, unsigned char* out) {
  MmaF16Lane lanes[32];
  for (int l = 0; l < 32; ++l)
    std::memcpy(&lanes[l], in + l * kSlotBytes, sizeof lanes[l]);
  for (int l = 0; l < 32; ++l) {
    for (int j = 0; j < 4; ++j) {
      const int row = l / 4, half = j / 2, col = 2 * (l % 4) + j % 2;
      float sum = lanes[l].c[j];
      for (int k = 0; k < 8; ++k) {
        const float a = HalfOf(lanes[4 * row + k / 2].a[half], k % 2);
        sum += a * HalfOf(lanes[4 * col + k / 2].b, k % 2);
      }
      std::memcpy(out + l * kSlotBytes + 4 * j, &sum, 4);
    }
  }
}

inline void MmaF16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  const MmaF16Lane lane{{c[0], c[1], c[2], c[3]}, {a0, a1}, b};
  bitnet_emulation::WarpOperation("mma.f16", &lane, sizeof lane, c, sizeof c, MmaF16Warp);
}

// Both halves of v times factor plus addend, rounded once.
inline uint32_t HalfFma2(uint32_t v, float factor, float addend) {
  const uint32_t low = FloatToHalfBits(HalfOf(v, 0) * factor + addend);
  const uint32_t high = FloatToHalfBits(HalfOf(v, 1) * factor + addend);
  return low | high << 16;
}

inline float LowHalf(uint32_t pair) { return HalfOf(pair, 0); }
inline float HighHalf(uint32_t pair) { return HalfOf(pair, 1); }

template <class Params>
Status LaunchKernel(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, Stream,
                    const Params& params) {
  const bool ran = bitnet_emulation::Run(grid, block, shared_bytes, [&] { kernel(params); });
  return ran ? Status::kOk : Status::kLaunchFailed;
}

}  // namespace bitnet
