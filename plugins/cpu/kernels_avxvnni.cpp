// The AVX-VNNI path, for processors with vpdpbusd in 256-bit registers (Alder Lake and later):
// one instruction multiplies 32 codes by 32 activations and adds fours into int32.
#include "blocking.h"
#include "tile256.h"

namespace bitnet_cpu {
namespace {

struct Vpdpbusd {
  static __m256i dot(__m256i sum, __m256i codes, __m256i x) {
    return _mm256_dpbusd_avx_epi32(sum, codes, x);
  }
  static __m256i widen(__m256i sum) { return sum; }
};

struct Isa : Isa256<Vpdpbusd> {
  // A sum of code 3 is scaled by 64, 4 products a step: 2^14 steps stay below 2^31.
  static constexpr int64_t kGemvSteps = int64_t{1} << 14;
  static_assert(kGemvSteps * 4 * 2 * 127 * 64 < (int64_t{1} << 31), "gemv sums fit an int32");

  // sums [16] += x [16 * steps] . codes. Codes are masked where they are, so code j counts 4^j
  // times; each j has sums of its own, shifted down at the end, exactly.
  static void gemv(const uint8_t* x, const uint8_t* packed, int64_t steps, int32_t* sums) {
    __m256i sum[4][2];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[j][0] = sum[j][1] = _mm256_setzero_si256();
    for (int64_t t = 0; t < steps; ++t, x += kStep, packed += kStepBytes) {
      _mm_prefetch((const char*)packed + 4096, _MM_HINT_T0);
      const __m256i low = load256(packed), high = load256(packed + 32);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m256i mask = _mm256_set1_epi8(char(3 << (2 * j)));
        const __m256i four = broadcast4(x + 4 * j);
        sum[j][0] = Vpdpbusd::dot(sum[j][0], _mm256_and_si256(low, mask), four);
        sum[j][1] = Vpdpbusd::dot(sum[j][1], _mm256_and_si256(high, mask), four);
      }
    }
    for (int v = 0; v < 2; ++v) {
      __m256i all = _mm256_add_epi32(load256(sums + 8 * v), sum[0][v]);
      all = _mm256_add_epi32(all, _mm256_srai_epi32(sum[1][v], 2));
      all = _mm256_add_epi32(all, _mm256_srai_epi32(sum[2][v], 4));
      store256(sums + 8 * v, _mm256_add_epi32(all, _mm256_srai_epi32(sum[3][v], 6)));
    }
  }
};

}  // namespace

const Kernels kAvxVnniKernels = {"avxvnni", quantize, to_float, multiply_int8<Isa>,
                                 multiply_float<Isa>};

}  // namespace bitnet_cpu
