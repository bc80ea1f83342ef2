// Which instruction path runs: the best one of this processor, or the one BITNET_CPU_PATH names.
#include <stdlib.h>
#include <string.h>

#include "internal.h"

#if defined(BITNET_CPU_X86) && !defined(BITNET_CPU_EMULATED)
#include <cpuid.h>
#elif defined(BITNET_CPU_ARM64)
#include <sys/auxv.h>
#endif

namespace bitnet_cpu {
namespace {

struct Path {
  const Kernels* kernels;
  bool (*supported)();
};

bool always() { return true; }

#if defined(BITNET_CPU_X86) && defined(BITNET_CPU_EMULATED)
// The test build in which every intrinsic is emulated: all paths run anywhere.
constexpr auto has_avx2 = always, has_avxvnni = always, has_avx512vnni = always;
#elif defined(BITNET_CPU_X86)

// The register state the operating system saves (XCR0): AVX needs bits 1-2, AVX-512 also 5-7.
uint32_t saved_state() {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_OSXSAVE)) return 0;
  uint32_t low = 0, high = 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

// avx2 kernels also use FMA and F16C; every processor with AVX2 but one (VIA) has both.
bool has_avx2() {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  if ((saved_state() & 0x6) != 0x6 || !__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return false;
  if (!(ecx & bit_FMA) || !(ecx & bit_F16C)) return false;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (ebx & bit_AVX2);
}

bool has_avxvnni() {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr uint32_t kAvxVnni = 1u << 4;  // leaf 7.1 EAX
  return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & kAvxVnni);
}

bool has_avx512vnni() {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!has_avx2() || (saved_state() & 0xe6) != 0xe6) return false;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  return (ebx & bit_AVX512F) && (ebx & bit_AVX512BW) && (ecx & bit_AVX512VNNI);
}
#elif defined(BITNET_CPU_ARM64)

bool has_dot_product() {
  constexpr unsigned long kAsimdDp = 1ul << 20;
  return getauxval(AT_HWCAP) & kAsimdDp;
}
#endif

// Best first.
constexpr Path kPaths[] = {
#if defined(BITNET_CPU_X86)
    {&kAvx512VnniKernels, has_avx512vnni},
    {&kAvxVnniKernels, has_avxvnni},
    {&kAvx2Kernels, has_avx2},
#elif defined(BITNET_CPU_ARM64)
    {&kNeonKernels, has_dot_product},
#endif
    {&kPortableKernels, always},
};

}  // namespace

bitnet_cpu_status choose_kernels(const Kernels** kernels) {
  const char* forced = getenv("BITNET_CPU_PATH");
  if (forced && !*forced) forced = nullptr;
  for (const Path& path : kPaths) {
    const bool named = forced && strcmp(forced, path.kernels->name) == 0;
    if (forced && !named) continue;
    if (path.supported()) {
      *kernels = path.kernels;
      return BITNET_CPU_OK;
    }
    if (named) return BITNET_CPU_UNSUPPORTED_PATH;
  }
  return BITNET_CPU_UNKNOWN_PATH;
}

}  // namespace bitnet_cpu

const char* bitnet_cpu_available_path(int index) {
  for (const bitnet_cpu::Path& path : bitnet_cpu::kPaths) {
    if (path.supported() && index-- == 0) return path.kernels->name;
  }
  return nullptr;
}
