// The emulation itself: that its arithmetic is the hardware's, and that it finds the mistakes it
// is there to find. Each `broken` kernel, named on the command line, must end the program.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>

#include "check.h"
#include "device_ops_emulation.h"

using namespace bitnet;

namespace {

struct Output {
  int32_t* values;
};

void HalvesRoundTrip() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float value = HalfBitsToFloat(static_cast<uint16_t>(bits));
    if (std::isnan(value)) continue;
    CHECK(FloatToHalfBits(value) == bits);
  }
  CHECK(FloatToHalfBits(65519.0f) == 0x7bff && FloatToHalfBits(65520.0f) == 0x7c00);
  CHECK(FloatToHalfBits(1.0f + 1.0f / 2048) == 0x3c00);  // a tie, to even
  CHECK(FloatToHalfBits(1.0f + 3.0f / 2048) == 0x3c02);
  CHECK(FloatToHalfBits(std::ldexp(1.0f, -25)) == 0 && FloatToHalfBits(std::ldexp(1.5f, -25)) == 1);
  CHECK(std::isnan(HalfBitsToFloat(FloatToHalfBits(NAN))));
}

void Dp4aMixesSigns() {
  CHECK(Dp4a(0xffffffffu, 0xffffffffu, 0) == -4 * 255);  // 255 times -1
  CHECK(Dp4a(0xc0c0c0c0u, 0x80808080u, 5) == 5 - 4 * 192 * 128);
  CHECK(Dp4a(0x04030201u, 0xff01fe02u, 0) == 1 * 2 - 2 * 2 + 3 * 1 - 4 * 1);
}

// C = A . B with A[r][k] = 16 r + k, B[k][c] = k - 2 c, against three plain loops.
void MmaKernel(Output out) {
  const int lane = static_cast<int>(threadIdx.x), row = lane / 4, quad = lane % 4;
  uint32_t a = 0, b = 0;
  for (int byte = 0; byte < 4; ++byte) {
    const int k = 4 * quad + byte;
    a |= static_cast<uint32_t>(16 * row + k) << 8 * byte;
    b |= (static_cast<uint32_t>(k - 2 * row) & 255u) << 8 * byte;
  }
  int32_t c[2] = {0, 0};
  MmaU8S8(c, a, b);
  for (int j = 0; j < 2; ++j) out.values[8 * row + 2 * quad + j] = c[j];
}

void MmaIsAMatrixProduct() {
  int32_t c[64];
  CHECK(LaunchKernel(MmaKernel, dim3(1), dim3(32), 0, nullptr, Output{c}) == Status::kOk);
  for (int row = 0; row < 8; ++row) {
    for (int col = 0; col < 8; ++col) {
      int32_t sum = 0;
      for (int k = 0; k < 16; ++k) sum += (16 * row + k) * (k - 2 * col);
      CHECK(c[8 * row + col] == sum);
    }
  }
}

void ShuffleKernel(Output out) {
  const int lane = static_cast<int>(threadIdx.x);
  out.values[lane] = __shfl_xor_sync(0xffffffffu, lane, 5);
}

void ShufflesExchange() {
  int32_t values[64];
  CHECK(LaunchKernel(ShuffleKernel, dim3(1), dim3(64), 0, nullptr, Output{values}) == Status::kOk);
  for (int i = 0; i < 64; ++i) CHECK(values[i] == (i ^ 5));
}

void BadLaunchesAreRefused() {
  int32_t values[64];
  const Output out{values};
  const auto launch = [&](unsigned blocks, unsigned threads, size_t shared_bytes) {
    return LaunchKernel(ShuffleKernel, dim3(blocks), dim3(threads), shared_bytes, nullptr, out);
  };
  CHECK(launch(1, 1056, 0) == Status::kLaunchFailed);
  CHECK(launch(0, 32, 0) == Status::kLaunchFailed);
  CHECK(launch(1, 32, 49168) == Status::kLaunchFailed);
}

// Thread 0 reads what the last thread wrote, with no barrier between.
void RacyKernel(Output out) {
  BITNET_SHARED(int32_t, shared);
  shared[threadIdx.x] = 7;
  if (threadIdx.x == 0) out.values[0] = shared[63];
}

// The second warp overwrites what the first one reads, a shuffle later: wrong only where the
// second is ahead. What is read again before its barrier in a loop looks like this.
void LateRacyKernel(Output out) {
  BITNET_SHARED(int32_t, shared);
  shared[threadIdx.x] = 7;
  __syncthreads();
  if (threadIdx.x == 0) out.values[0] = shared[0];
  __shfl_xor_sync(0xffffffffu, 0, 1);
  if (threadIdx.x == 32) shared[0] = 8;
}

// The first warp reads between two steps of the second: wrong only where they take turns.
void InterleavedRacyKernel(Output out) {
  BITNET_SHARED(int32_t, shared);
  if (threadIdx.x == 32) shared[0] = 8;
  __shfl_xor_sync(0xffffffffu, 0, 1);
  if (threadIdx.x == 0) out.values[0] = shared[0] == 8 ? 8 : 7;
  __shfl_xor_sync(0xffffffffu, 0, 1);
  if (threadIdx.x == 32) shared[0] = 7;
}

// In how many of 40 orders value[0] is not what it is to be.
int TimesWrong(void (*kernel)(Output)) {
  int wrong = 0;
  for (uint64_t seed = 0; seed < 40; ++seed) {
    int32_t value = 0;
    bitnet_emulation::SetSeed(seed);
    CHECK(LaunchKernel(kernel, dim3(1), dim3(64), 256, nullptr, Output{&value}) == Status::kOk);
    wrong += value != 7;
  }
  return wrong;
}

void RacesShow() {
  CHECK(TimesWrong(RacyKernel) > 6);             // half of all orders, in expectation
  CHECK(TimesWrong(LateRacyKernel) > 3);         // a quarter
  CHECK(TimesWrong(InterleavedRacyKernel) > 3);  // half
}

// Each thread reads its neighbour's word behind a barrier.
void NeighbourKernel(Output out) {
  BITNET_SHARED(int32_t, shared);
  shared[threadIdx.x] = 7;
  __syncthreads();
  if (threadIdx.x == 0) out.values[0] = shared[63];
}

void BarriersCanBeLeftOut() {
  CHECK(TimesWrong(NeighbourKernel) == 0);
  int noticed = 0;
  for (const std::string& barrier : bitnet_emulation::ReachedBarriers()) {
    bitnet_emulation::LeaveOutBarrier(barrier);
    noticed += TimesWrong(NeighbourKernel) > 6;
  }
  CHECK(noticed == 1);  // of this kernel's; the other ones are LateRacyKernel's
  bitnet_emulation::LeaveOutBarrier("");
  CHECK(TimesWrong(NeighbourKernel) == 0);
}

void MissedBarrierKernel(Output) {
  if (threadIdx.x < 16) __syncthreads();
  else __syncthreads();
}
void MissedShuffleKernel(Output out) {
  if (threadIdx.x < 31) out.values[0] = __shfl_xor_sync(0xffffffffu, 1, 1);
}
void PastTheEndKernel(Output) {
  BITNET_SHARED(int32_t, shared);
  shared[threadIdx.x + 1] = 0;
}

void RunBroken(const std::string& name) {
  int32_t value = 0;
  void (*kernel)(Output) = name == "barrier"   ? MissedBarrierKernel
                           : name == "shuffle" ? MissedShuffleKernel
                                               : PastTheEndKernel;
  LaunchKernel(kernel, dim3(1), dim3(32), 128, nullptr, Output{&value});
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) {
    RunBroken(argv[1]);
    return 0;
  }
  HalvesRoundTrip();
  Dp4aMixesSigns();
  MmaIsAMatrixProduct();
  ShufflesExchange();
  BadLaunchesAreRefused();
  RacesShow();
  BarriersCanBeLeftOut();
  return g_failures ? 1 : 0;
}
