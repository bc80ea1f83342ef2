// The AVX-VNNI path, for processors with vpdpbusd in 256-bit registers (Alder Lake and later):
// one instruction multiplies 32 codes by 32 activations and adds fours into int32.
#include "blocking.h"
#include "tile256.h"

namespace bitnet_cpu {
namespace {

// Two products a cycle, each 5 cycles: ten sums at least keep them from waiting for each other.
struct Vpdpbusd {
  static constexpr int kRows = 6;
  static constexpr bool kFused = false;
  static constexpr bool kEvenTiles = false;  // the tile of 6 wastes nothing, that of 4 does
  static constexpr int chains(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
  // In assembly where it is not emulated, for gcc would reorder the sums, copy and spill them.
  static __m256i dot(__m256i sum, __m256i codes, __m256i x) {
#if defined(BITNET_CPU_EMULATED)
    return _mm256_dpbusd_avx_epi32(sum, codes, x);
#else
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(x));
    return sum;
#endif
  }
  static __m256i widen(__m256i sum) { return sum; }
};

// sum[j] += codes j of a step; those of odd j count 4 times, for masking a code in place is
// cheaper than shifting it down first. (Masks for all four j would not fit the registers.)
inline void gemv_step(__m256i words, const __m256i (&x)[4], __m256i (&sum)[4]) {
  const __m256i mask1 = _mm256_set1_epi8(3), mask4 = _mm256_set1_epi8(12);
  const __m256i upper = _mm256_srli_epi16(words, 4);
  sum[0] = Vpdpbusd::dot(sum[0], _mm256_and_si256(words, mask1), x[0]);
  sum[1] = Vpdpbusd::dot(sum[1], _mm256_and_si256(words, mask4), x[1]);
  sum[2] = Vpdpbusd::dot(sum[2], _mm256_and_si256(upper, mask1), x[2]);
  sum[3] = Vpdpbusd::dot(sum[3], _mm256_and_si256(upper, mask4), x[3]);
}

inline void add_sums(const __m256i (&sum)[4], int32_t* sums) {
  const __m256i ones = _mm256_add_epi32(sum[0], sum[2]);
  const __m256i fours = _mm256_srai_epi32(_mm256_add_epi32(sum[1], sum[3]), 2);  // exact
  store256(sums, _mm256_add_epi32(load256(sums), _mm256_add_epi32(ones, fours)));
}

struct Isa : Isa256<Vpdpbusd> {
  static constexpr int64_t kGemvSteps = int64_t{1} << 16;
  static_assert(kGemvSteps * 2 * 4 * (2 * 127) * 4 < (int64_t{1} << 31), "sums fit an int32");

  // sums [16] += x [16 * steps] . codes.
  static void gemv(const uint8_t* x, Packed<1> weights, int64_t steps, int32_t* sums) {
    const uint8_t* packed = weights.first;
    const __m256i zero = _mm256_setzero_si256();
    __m256i low[4] = {zero, zero, zero, zero}, high[4] = {zero, zero, zero, zero};
    for (int64_t t = 0; t < steps; ++t, x += kStep, packed += kStepBytes) {
      const __m256i four[4] = {broadcast4(x), broadcast4(x + 4), broadcast4(x + 8),
                               broadcast4(x + 12)};
      _mm_prefetch((const char*)packed + 4096, _MM_HINT_T0);
      gemv_step(load256(packed), four, low);
      gemv_step(load256(packed + 32), four, high);
    }
    add_sums(low, sums);
    add_sums(high, sums + 8);
  }
};

}  // namespace

const Kernels kAvxVnniKernels = {"avxvnni", quantize, to_float, multiply_int8<Isa>,
                                 multiply_float<Isa>};

}  // namespace bitnet_cpu
