// Measures what this processor can do at most, on one thread, and prints it as JSON: the rate of
// multiply-accumulates in the inner step of the best path (no memory, no unpacking), and reading
// from memory. tools/bench_cpu.py reports speed as a share of these.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <vector>

#include "bitnet_cpu.h"

namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

constexpr int kRounds = 40, kLoops = 50000, kChains = 8;

// The best of several rounds of kLoops x kChains steps, in steps a second.
template <class F>
double steps_per_second(F loop) {
  double best = 0;
  for (int round = 0; round < kRounds; ++round) {
    const double start = now();
    for (int i = 0; i < kLoops; ++i) loop();
    best = std::max(best, double(kLoops) * kChains / (now() - start));
  }
  return best;
}

#define STEP_AVX2(n)                       \
  "vpmaddubsw %%ymm14, %%ymm15, %%ymm13\n" \
  "vpaddw %%ymm13, %%ymm" #n ", %%ymm" #n "\n"
#define STEP_AVXVNNI(n) "%{vex%} vpdpbusd %%ymm14, %%ymm15, %%ymm" #n "\n"
#define STEP_AVX512VNNI(n) "vpdpbusd %%zmm14, %%zmm15, %%zmm" #n "\n"
#define EIGHT(STEP) STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7)
#define CLOBBERS                                                                               \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm13"

double products_per_second(const char* path) {
  if (!std::strcmp(path, "avx512vnni"))
    return 64 * steps_per_second([] { __asm__ volatile(EIGHT(STEP_AVX512VNNI)::: CLOBBERS); });
  if (!std::strcmp(path, "avxvnni"))
    return 32 * steps_per_second([] { __asm__ volatile(EIGHT(STEP_AVXVNNI)::: CLOBBERS); });
  if (!std::strcmp(path, "avx2"))
    return 32 * steps_per_second([] { __asm__ volatile(EIGHT(STEP_AVX2)::: CLOBBERS); });
  return 0;
}

// Four streams at once: one alone leaves bandwidth unused.
__attribute__((target("avx2"))) double bytes_per_second() {
  constexpr size_t kStreams = 4, kPart = size_t{64} << 20;
  std::vector<char> memory(kStreams * kPart, 1);
  double best = 0;
  __m256i sum = _mm256_setzero_si256();
  for (int round = 0; round < 7; ++round) {
    const double start = now();
    for (size_t i = 0; i < kPart; i += 64) {
      for (size_t stream = 0; stream < kStreams; ++stream) {
        const auto* line = reinterpret_cast<const __m256i*>(memory.data() + stream * kPart + i);
        sum = _mm256_add_epi32(sum, _mm256_loadu_si256(line));
        sum = _mm256_add_epi32(sum, _mm256_loadu_si256(line + 1));
      }
    }
    best = std::max(best, double(memory.size()) / (now() - start));
  }
  volatile int keep = _mm256_extract_epi32(sum, 0);
  (void)keep;
  return best;
}

}  // namespace

int main() {
  const char* path = bitnet_cpu_available_path(0);
  const bool vectors = std::strcmp(path, "portable") != 0;
  std::printf("{\"path\": \"%s\", \"gmac_per_second\": %.1f, \"read_gb_per_second\": %.1f}\n", path,
              products_per_second(path) / 1e9, vectors ? bytes_per_second() / 1e9 : 0.0);
  return 0;
}
