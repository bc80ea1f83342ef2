// The CUDA dialect the kernels are written in, for the host compiler: the same .cu sources,
// compiled as C++17 with BITNET_EMULATION defined, run on the CPU through scheduler.h. Made for
// tests; it holds what these kernels use and no more.
//
// Not modelled, so not proved by a passing test: timing, occupancy, registers and spills; bank
// conflicts and coalescing; memory ordering between blocks, and between threads that share no
// barrier (threads run one at a time, to the next barrier or warp operation, so a data race
// shows only if the order of those stretches changes the result); warps that diverge inside a
// stretch; denormal flushing, fast-math and fused multiply-add; streams (a launch runs at once) and
// graph capture; asynchronous errors. Misaligned vector accesses are found by the compiler's
// alignment checks (CMakeLists.txt turns them on), not by this header.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (bitnet_emulation::g_place.thread_idx)
#define blockIdx (bitnet_emulation::g_place.block_idx)
#define blockDim (bitnet_emulation::g_place.block_dim)
#define gridDim (bitnet_emulation::g_place.grid_dim)

#define BITNET_STRINGIZE_(x) #x
#define BITNET_STRINGIZE(x) BITNET_STRINGIZE_(x)
#define __syncthreads() \
  bitnet_emulation::SyncThreads(__FILE__ ":" BITNET_STRINGIZE(__LINE__))

namespace bitnet_emulation {

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using dim3 = Dim3;

template <class To, class From>
To BitCast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline uint32_t __float_as_uint(float x) { return BitCast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return BitCast<float>(x); }
// Explicitly rounded arithmetic: nothing is fused (the build sets -ffp-contract=off).
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __int2float_rn(int32_t x) { return static_cast<float>(x); }
// Saturates, and turns NaN into 0, as the hardware does.
inline int32_t __float2int_rn(float x) {
  if (std::isnan(x)) return 0;
  const float r = std::nearbyint(x);
  if (r >= 2147483648.0f) return INT32_MAX;
  if (r < -2147483648.0f) return INT32_MIN;
  return static_cast<int32_t>(r);
}

// IEEE binary16, storage only.
struct __half {
  uint16_t bits;
};

inline float HalfBitsToFloat(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
  const float magnitude = exponent ? std::ldexp(1024.0f + mantissa, static_cast<int>(exponent) - 25)
                                   : std::ldexp(static_cast<float>(mantissa), -24);
  return sign ? -magnitude : magnitude;
}

// Rounds to nearest, ties to even.
inline uint16_t FloatToHalfBits(float f) {
  const uint16_t sign = static_cast<uint16_t>(__float_as_uint(f) >> 16 & 0x8000u);
  if (std::isnan(f)) return 0x7fff;
  const float magnitude = std::fabs(f);
  if (magnitude >= 65520.0f) return sign | 0x7c00u;
  int exponent = magnitude > 0.0f ? std::ilogb(magnitude) : -24;
  if (exponent < -14) exponent = -14;  // denormals share the spacing of the smallest normals
  const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  // steps includes the hidden bit; a carry out of it moves to the next exponent by itself.
  return sign | static_cast<uint16_t>((static_cast<uint32_t>(exponent + 14) << 10) + steps);
}

inline float __half2float(__half h) { return HalfBitsToFloat(h.bits); }
inline __half __float2half_rn(float f) { return {FloatToHalfBits(f)}; }

// Threads run one at a time between barriers, so a plain addition is atomic.
inline int32_t atomicAdd(int32_t* address, int32_t value) {
  const int32_t old = *address;
  *address += value;
  return old;
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int32_t lane_mask) {
  if (mask != 0xffffffffu) Fail("only full warps are modelled");
  struct Message {
    T value;
    int32_t lane_mask;
  } message{value, lane_mask};
  T result;
  WarpOperation("shfl_xor", &message, sizeof message, &result, sizeof result,
                [](const unsigned char* in, unsigned char* out) {
                  for (unsigned lane = 0; lane < 32; ++lane) {
                    Message own;
                    std::memcpy(&own, in + lane * kSlotBytes, sizeof own);
                    const unsigned peer = (lane ^ static_cast<unsigned>(own.lane_mask)) & 31;
                    std::memcpy(out + lane * kSlotBytes, in + peer * kSlotBytes, sizeof(T));
                  }
                });
  return result;
}

}  // namespace bitnet_emulation

using namespace bitnet_emulation;  // kernels name these as CUDA does, at global scope
