// Runs every kernel family on every case of a golden file that it supports and compares with the
// reference's answers: bit for bit where the file's tolerance is 0, within it elsewhere. Outputs
// and workspace are poisoned before each run. In the emulation each case runs under several
// random thread orders, which must agree bit for bit: the kernels are deterministic.
//
//   golden_test FILE [FAMILY] [SEED]    FAMILY: a name as FamilyName gives it, or all
//   golden_test FILE FAMILY barriers    and then leaves out each barrier of its kernels in turn:
//                                       some case has to fail then, or nothing tests the barrier
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <optional>
#include <string>

#include "device_buffer.h"
#include "golden.h"

#ifdef BITNET_TEST_ON_DEVICE
#include <cuda_runtime_api.h>
static void SeedOrder(uint64_t) {}
static constexpr int kOrders = 1;
#else
#include <sys/wait.h>
#include <unistd.h>

#include "scheduler.h"
static void SeedOrder(uint64_t seed) { bitnet_emulation::SetSeed(seed); }
static constexpr int kOrders = 2;
#endif

using namespace bitnet;

namespace {

constexpr unsigned char kPoison = 0x7b;  // fp32 1.3e36, fp16 61296: no plausible output

double ToDouble(const unsigned char* bytes, DType type) {
  if (type == DType::kFloat32) {
    float value;
    std::memcpy(&value, bytes, 4);
    return value;
  }
  uint16_t h;
  std::memcpy(&h, bytes, 2);
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  double value = exponent == 31 ? (mantissa ? NAN : INFINITY)
                 : exponent     ? std::ldexp(1024.0 + mantissa, exponent - 25)
                                : std::ldexp(mantissa, -24);
  return h & 0x8000 ? -value : value;
}

struct Run {
  Status status;
  std::vector<unsigned char> y;
};

std::optional<std::string> FirstDifference(const GoldenCase& c,
                                           const std::vector<unsigned char>& y) {
  const size_t bytes = c.ElementBytes();
  for (size_t i = 0; i < c.tolerance.size(); ++i) {
    const double got = ToDouble(&y[i * bytes], c.type), want = ToDouble(&c.y[i * bytes], c.type);
    if (std::isnan(got) && std::isnan(want)) continue;
    if (got == want) continue;
    if (std::isfinite(want) && c.tolerance[i] > 0 && std::fabs(got - want) <= c.tolerance[i]) continue;
    char text[160];
    const size_t n = static_cast<size_t>(c.shape.n);
    std::snprintf(text, sizeof text, "y[%zu, %zu] = %.9g, the reference has %.9g (allowed %.3g)",
                  i / n, i % n, got, want, static_cast<double>(c.tolerance[i]));
    return text;
  }
  return std::nullopt;
}

Run RunCase(const GoldenCase& c, KernelFamily family, const DeviceInfo& device) {
  const DeviceBuffer x(c.x.data(), c.x.size());
  const DeviceBuffer weight(c.packed_weight.data(), c.packed_weight.size() * 4);
  const DeviceBuffer scale(c.scale.data(), c.scale.size() * 4);
  const DeviceBuffer bias(c.bias.data(), c.bias.size() * 4);
  const DeviceBuffer y(c.y.size(), kPoison);
  const DeviceBuffer workspace(WorkspaceBytes(c.shape), kPoison);

  TernaryMatMulArgs args;
  args.x = x.get();
  args.packed_weight = weight.get<uint32_t>();
  args.scale = scale.get<float>();
  args.bias = c.bias.empty() ? nullptr : bias.get<float>();
  args.y = y.get();
  args.workspace = workspace.get();
  args.workspace_bytes = workspace.bytes();
  Run run{Launch(family, c.shape, c.type, args, device, nullptr), {}};
#ifdef BITNET_TEST_ON_DEVICE
  if (const cudaError_t error = cudaDeviceSynchronize(); error != cudaSuccess)
    throw std::runtime_error(cudaGetErrorString(error));
#endif
  run.y.resize(c.y.size());
  y.Read(run.y.data());
  for (const DeviceBuffer* buffer : {&x, &weight, &scale, &bias, &y, &workspace}) {
    if (!buffer->FrontIntact()) throw std::runtime_error("wrote in front of a buffer");
  }
  return run;
}

// Failures of one case.
int TestCase(const GoldenCase& c, KernelFamily family, const DeviceInfo& device, uint64_t seed) {
  std::vector<unsigned char> first;
  for (int order = 0; order < kOrders; ++order) {
    SeedOrder(seed + static_cast<uint64_t>(order));
    const Run run = RunCase(c, family, device);
    std::optional<std::string> problem;
    if (run.status != Status::kOk) problem = StatusString(run.status);
    else problem = FirstDifference(c, run.y);
    if (!problem && order && run.y != first) problem = "another thread order gives other bits";
    if (problem) {
      std::printf("FAIL %s %s: %s\n", FamilyName(family), c.Name().c_str(), problem->c_str());
      return 1;
    }
    first = run.y;
  }
  return 0;
}

// Failures of all cases the family supports; ran: how many those are.
int TestFamily(const std::vector<GoldenCase>& cases, KernelFamily family, const DeviceInfo& device,
               uint64_t seed, int* ran) {
  int failed = 0;
  *ran = 0;
  for (const GoldenCase& c : cases) {
    if (!Supports(family, c.shape, c.type, device)) continue;
    ++*ran;
    failed += TestCase(c, family, device, seed);
  }
  return failed;
}

#ifndef BITNET_TEST_ON_DEVICE
// Whether a case fails without the barrier. In a process of its own, for it may well crash.
bool IsNoticed(const std::string& barrier, const std::vector<GoldenCase>& cases,
               KernelFamily family, const DeviceInfo& device) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child < 0) throw std::runtime_error("cannot fork");
  if (child == 0) {
    std::freopen("/dev/null", "w", stdout);
    std::freopen("/dev/null", "w", stderr);
    bitnet_emulation::LeaveOutBarrier(barrier);
    for (const GoldenCase& c : cases) {
      if (Supports(family, c.shape, c.type, device) && TestCase(c, family, device, 1)) _exit(1);
    }
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return !WIFEXITED(status) || WEXITSTATUS(status) != 0;
}

// Barriers whose absence no case shows, of those that the cases have reached before.
int TestBarriers(const std::vector<GoldenCase>& cases, KernelFamily family,
                 const DeviceInfo& device) {
  int unnoticed = 0;
  const auto barriers = bitnet_emulation::ReachedBarriers();
  if (barriers.empty()) throw std::runtime_error("the kernels have no barriers");
  for (const std::string& barrier : barriers) {
    if (IsNoticed(barrier, cases, family, device)) continue;
    ++unnoticed;
    std::printf("FAIL %s: no case needs the barrier at %s\n", FamilyName(family), barrier.c_str());
  }
  std::printf("%s: %zu barriers left out in turn\n", FamilyName(family), barriers.size());
  return unnoticed;
}
#else
int TestBarriers(const std::vector<GoldenCase>&, KernelFamily, const DeviceInfo&) {
  throw std::runtime_error("barriers can be left out in the emulation only");
}
#endif

bool NeedsTensorCores(KernelFamily family) {
  return family == KernelFamily::kTileImma || family == KernelFamily::kTileHmma;
}

int Main(int argc, char** argv) {
  if (argc < 2) throw std::runtime_error("usage: golden_test FILE [FAMILY] [SEED]");
  const std::string only = argc > 2 ? argv[2] : "all";
  const bool barriers = argc > 3 && std::string(argv[3]) == "barriers";
  const uint64_t seed = argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 1;
  const auto cases = ReadGolden(argv[1]);
  DeviceInfo device;
  if (QueryDevice(&device) != Status::kOk) throw std::runtime_error("no CUDA device");

  int total = 0, failed = 0;
  for (const KernelFamily family : kFamilies) {
    if (only != "all" && only != FamilyName(family)) continue;
    int ran = 0;
    failed += TestFamily(cases, family, device, barriers ? 1 : seed, &ran);
    if (barriers) failed += TestBarriers(cases, family, device);
    std::printf("%s: %d of %zu cases\n", FamilyName(family), ran, cases.size());
    if (!ran && (only != "all" || device.real_tensor_cores || !NeedsTensorCores(family)))
      throw std::runtime_error(std::string(FamilyName(family)) + " supports no case");
    total += ran;
  }
  if (!total) throw std::runtime_error("no family " + only);
  std::printf("%d cases run, %d failed\n", total, failed);
  return failed ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return Main(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "golden_test: %s\n", error.what());
    return 2;
  }
}
