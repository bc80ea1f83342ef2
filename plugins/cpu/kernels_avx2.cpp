// The AVX2 path: vpmaddubsw multiplies 32 codes by 32 activations and adds neighbours into int16.
//
// No sum saturates: a pair is at most 2 * 2 * 127 = 508 in size, so an int16 holds 64 of them,
// the 16 steps of a chunk (4 pairs a step and lane); then one vpmaddwd by ones widens to int32.
// 32 products so cost two instructions. Its speed of light is the processor's vpmaddubsw rate.
#include "blocking.h"
#include "tile256.h"

namespace bitnet_cpu {
namespace {

constexpr int64_t kPairs = 32767 / (2 * 2 * 127);  // that an int16 holds

struct Maddubs {
  static constexpr int kRows = 4;
  static constexpr bool kFused = true;
  static constexpr bool kEvenTiles = true;
  static constexpr int chains(int) { return 1; }  // the addition takes one cycle
  static __m256i dot(__m256i sum, __m256i codes, __m256i x) {
    return pinned(_mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, x)));
  }
  static __m256i widen(__m256i sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
};

// sum1 += codes 0 and 2 of a step, sum4 += 4 * (codes 1 and 3): masking a code in place costs one
// instruction where shifting it down first costs two, and at one row unpacking is half the work.
inline void gemv_step(__m256i words, const __m256i (&x)[4], __m256i* sum1, __m256i* sum4) {
  const __m256i mask1 = _mm256_set1_epi8(3), mask4 = _mm256_set1_epi8(12);
  const __m256i upper = _mm256_srli_epi16(words, 4);
  *sum1 = Maddubs::dot(*sum1, _mm256_and_si256(words, mask1), x[0]);
  *sum4 = Maddubs::dot(*sum4, _mm256_and_si256(words, mask4), x[1]);
  *sum1 = Maddubs::dot(*sum1, _mm256_and_si256(upper, mask1), x[2]);
  *sum4 = Maddubs::dot(*sum4, _mm256_and_si256(upper, mask4), x[3]);
}

struct Isa : Isa256<Maddubs> {
  static constexpr int64_t kGemvSteps = int64_t{1} << 20;
  static constexpr int64_t kHalf = 8;  // steps until sum4 is full: 2 pairs of 4 * 508 a step
  static_assert(kChunkSteps * 4 <= kPairs, "a chunk's sums fit an int16");
  static_assert(kHalf * 2 * 4 <= kPairs, "sum4 fits an int16");

  // sums [16] += x [16 * steps] . codes.
  static void gemv(const uint8_t* x, Packed<1> weights, int64_t steps, int32_t* sums) {
    const uint8_t* packed = weights.first;
    __m256i wide0 = load256(sums), wide1 = load256(sums + 8);
    while (steps > 0) {
      __m256i sum[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
      for (int half = 0; half < 2; ++half) {
        __m256i sum4[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
        const int64_t n = steps < kHalf ? steps : kHalf;
        for (int64_t t = 0; t < n; ++t, x += kStep, packed += kStepBytes) {
          const __m256i four[4] = {broadcast4(x), broadcast4(x + 4), broadcast4(x + 8),
                                   broadcast4(x + 12)};
          _mm_prefetch((const char*)packed + 2048, _MM_HINT_T0);
          gemv_step(load256(packed), four, &sum[0], &sum4[0]);
          gemv_step(load256(packed + 32), four, &sum[1], &sum4[1]);
        }
        sum[0] = _mm256_add_epi16(sum[0], _mm256_srai_epi16(sum4[0], 2));  // exact: 4 times
        sum[1] = _mm256_add_epi16(sum[1], _mm256_srai_epi16(sum4[1], 2));
        steps -= n;
      }
      wide0 = _mm256_add_epi32(wide0, Maddubs::widen(sum[0]));
      wide1 = _mm256_add_epi32(wide1, Maddubs::widen(sum[1]));
    }
    store256(sums, wide0);
    store256(sums + 8, wide1);
  }
};

}  // namespace

const Kernels kAvx2Kernels = {"avx2", quantize, to_float, multiply_int8<Isa>, multiply_float<Isa>};

}  // namespace bitnet_cpu
