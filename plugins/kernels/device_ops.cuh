// The few instructions and launch details that CUDA C++ has no portable name for. Kernels use
// these wrappers and no inline assembly of their own; the host emulation replaces this file's
// second half (../emulation/device_ops_emulation.h).
#pragma once

#include "ternary_matmul.h"

#ifdef BITNET_EMULATION
#include "device_ops_emulation.h"
#else

#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace bitnet {

// The block's dynamic shared memory. All shared memory is dynamic, so that the emulation can
// put a guard page behind it.
#define BITNET_SHARED(type, name)                 \
  extern __shared__ uint4 bitnet_shared_memory[]; \
  type* name = reinterpret_cast<type*>(bitnet_shared_memory)

// threadIdx.x, read anew: unlike the built-in variable, what is computed from it is not kept in
// registers across a loop for the code behind it.
__device__ __forceinline__ int FreshThreadIndex() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// Weights pass once: keep them out of L1, where the activations live.
__device__ __forceinline__ uint4 LoadStreaming(const uint4* address) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(address));
  return v;
}

// sum + codes . x over four bytes, codes unsigned (masks reach 192), x signed. The __dp4a
// intrinsic has no mixed-sign form.
__device__ __forceinline__ int32_t Dp4a(uint32_t codes, uint32_t x, int32_t sum) {
  int32_t d;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(codes), "r"(x), "r"(sum));
  return d;
}

// (word & mask) | bits in one instruction; with two constants the compiler makes it two.
__device__ __forceinline__ uint32_t MaskOr(uint32_t word, uint32_t mask, uint32_t bits) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(word), "r"(mask), "r"(bits));
  return d;
}

// c[8x8] += a[8x16] u8 . b[16x8] s8. Lane l: a[l/4][4(l%4)..+3], b[4(l%4)..+3][l/4],
// c[l/4][2(l%4)..+1].
__device__ __forceinline__ void MmaU8S8(int32_t (&c)[2], uint32_t a, uint32_t b) {
  asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+r"(c[0]), "+r"(c[1])
               : "r"(a), "r"(b));
}

// c[16x8] += a[16x8] f16 . b[8x8] f16, fp32 sums. Lane l: a[l/4 + 8r][2(l%4)..+1] in ar,
// b[2(l%4)..+1][l/4], c[l/4 + 8r][2(l%4)..+1] in c[2r..+1].
__device__ __forceinline__ void MmaF16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}

// Both halves of v times factor plus addend, rounded once; constants fold.
__device__ __forceinline__ uint32_t HalfFma2(uint32_t v, float factor, float addend) {
  const __half2 r = __hfma2(*reinterpret_cast<const __half2*>(&v), __float2half2_rn(factor),
                            __float2half2_rn(addend));
  return *reinterpret_cast<const uint32_t*>(&r);
}

// The halves of a pair as fp32: exact.
__device__ __forceinline__ float LowHalf(uint32_t pair) {
  return __low2float(*reinterpret_cast<const __half2*>(&pair));
}
__device__ __forceinline__ float HighHalf(uint32_t pair) {
  return __high2float(*reinterpret_cast<const __half2*>(&pair));
}

// Reports this launch's own error, not one left behind by the application.
template <class Params>
Status LaunchKernel(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes,
                    Stream stream, const Params& params) {
  void* arguments[] = {const_cast<Params*>(&params)};
  const cudaError_t error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block,
                                             arguments, shared_bytes, stream);
  return error == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
}

}  // namespace bitnet

#endif  // BITNET_EMULATION
