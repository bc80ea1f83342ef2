// Measures what this processor can do at most, on a number of threads (the argument), and prints
// it as JSON: the rates of multiply-accumulates in the inner step of the best int8 path (no memory,
// no unpacking) and in float32, and reading from memory. tools/bench_cpu.py reports speed as a
// share of these.
#include <immintrin.h>
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "bitnet_cpu.h"

namespace {

// The thread's own processor time, which leaves out what other programs take.
double now() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return double(time.tv_sec) + double(time.tv_nsec) * 1e-9;
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
#define STEP_FMA256(n) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #n "\n"
#define STEP_FMA512(n) "vfmadd231ps %%zmm14, %%zmm15, %%zmm" #n "\n"
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

double float_products_per_second(const char* path) {
  if (!std::strcmp(path, "avx512vnni"))
    return 16 * steps_per_second([] { __asm__ volatile(EIGHT(STEP_FMA512)::: CLOBBERS); });
  if (std::strcmp(path, "portable"))  // AVX2 with FMA
    return 8 * steps_per_second([] { __asm__ volatile(EIGHT(STEP_FMA256)::: CLOBBERS); });
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

// What `threads` threads reach together, all at once.
template <class F>
double total(int threads, F measure) {
  std::vector<double> rates(threads);
  std::vector<std::thread> running;
  for (int i = 0; i < threads; ++i)
    running.emplace_back([&rates, &measure, i] { rates[i] = measure(); });
  for (auto& one : running) one.join();
  double sum = 0;
  for (double rate : rates) sum += rate;
  return sum;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
  const char* path = bitnet_cpu_available_path(0);
  const bool vectors = std::strcmp(path, "portable") != 0;
  const double int8 = total(threads, [&] { return products_per_second(path); });
  const double fp32 = total(threads, [&] { return float_products_per_second(path); });
  const double read = total(threads, [&] { return vectors ? bytes_per_second() : 0.0; });
  std::printf("{\"path\": \"%s\", \"threads\": %d, \"int8_gmac\": %.1f, \"fp32_gmac\": %.1f, "
              "\"read_gb\": %.1f}\n",
              path, threads, int8 / 1e9, fp32 / 1e9, read / 1e9);
  return 0;
}
