// For tests only: x86 intrinsics emulated by SIMDe (Debian: libsimde-dev), so that the AVX512-VNNI
// and AVX-VNNI sources run, as they are, on a processor that has neither.
#ifndef BITNET_CPU_SIMDE_INTRINSICS_H_
#define BITNET_CPU_SIMDE_INTRINSICS_H_

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

// Its vpdpbusd with a VEX prefix has another name there.
#ifndef _mm256_dpbusd_avx_epi32
#define _mm256_dpbusd_avx_epi32(sum, codes, x) simde_mm256_dpbusd_epi32(sum, codes, x)
#endif

#endif  // BITNET_CPU_SIMDE_INTRINSICS_H_
