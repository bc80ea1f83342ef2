// The launch interface: which shapes are legal, that each has a kernel, what is refused and how,
// and how much workspace is asked for. The numbers are golden_test's business.
#include <string>
#include <utility>

#include "check.h"
#include "device_buffer.h"
#include "scheduler.h"
#include "ternary_matmul.h"

using namespace bitnet;

namespace {

const DeviceInfo kT4 = MakeDeviceInfo("Tesla T4", 75, 40);
const DeviceInfo kGtx1660 = MakeDeviceInfo("NVIDIA GeForce GTX 1660", 75, 22);

TernaryMatMulShape Shape(int32_t m, int32_t k, int32_t n, int32_t group = 0, int32_t bits = 8) {
  return {m, k, n, group, bits, group ? n * (k / group) : n};
}

void TensorCoresAreKnownByName() {
  for (const char* real : {"NVIDIA GeForce RTX 2060", "Tesla T4", "Tesla T4G", "T4", "NVIDIA T4",
                           "Quadro RTX 4000", "TITAN RTX", "Tesla T10", "GRID T4-16Q",
                           "NVIDIA T4-8C"})
    CHECK(MakeDeviceInfo(real, 75, 30).real_tensor_cores);
  for (const char* none : {"NVIDIA GeForce GTX 1660", "NVIDIA GeForce GTX 1650 Ti", "NVIDIA T400",
                           "NVIDIA T400 4GB", "T1000", "NVIDIA T1000 8GB", "XT4", "Quadro T2000", "GeForce MX450", ""})
    CHECK(!MakeDeviceInfo(none, 75, 30).real_tensor_cores);
  CHECK(!MakeDeviceInfo(nullptr, 75, 30).real_tensor_cores);
  CHECK(MakeDeviceInfo("NVIDIA A2", 86, 10).real_tensor_cores);
}

void IllegalShapesAreRefused() {
  CHECK(CheckShape(Shape(1, 1, 1)) == Status::kOk);
  CHECK(CheckShape(Shape(0, 64, 4)) == Status::kInvalidShape);
  CHECK(CheckShape(Shape(1, 0, 4)) == Status::kInvalidShape);
  CHECK(CheckShape(Shape(1, 64, 0)) == Status::kInvalidShape);
  CHECK(CheckShape(Shape(1, kMaxK, 1)) == Status::kOk);
  CHECK(CheckShape(Shape(1, kMaxK + 1, 1)) == Status::kInvalidShape);
  CHECK(CheckShape(Shape(1, 100, 4, 64)) == Status::kInvalidShape);
  CHECK(CheckShape(Shape(1, 64, 4, -1)) == Status::kInvalidShape);
  CHECK(CheckShape(Shape(1, 64, 4, 0, 4)) == Status::kInvalidShape);
  CHECK(CheckShape(Shape(1, kMaxK, 1 << 30)) == Status::kInvalidShape);
  TernaryMatMulShape shape = Shape(1, 128, 4, 64);
  shape.scale_count = 4;
  CHECK(CheckShape(shape) == Status::kInvalidShape);
  shape.scale_count = 1;
  CHECK(CheckShape(shape) == Status::kInvalidShape);
  shape = Shape(1, 128, 4);
  shape.scale_count = 1;
  CHECK(CheckShape(shape) == Status::kOk);
  shape.scale_count = 3;
  CHECK(CheckShape(shape) == Status::kInvalidShape);
}

void EveryLegalShapeHasAKernel() {
  for (const DeviceInfo& device : {kT4, kGtx1660}) {
    for (const DType type : {DType::kFloat32, DType::kFloat16}) {
      for (const int32_t bits : {8, 0}) {
        for (const int32_t m : {1, 3, 8, 9, 64, 5000, 65535 * 64}) {
          for (const int32_t group : {0, 3, 16, 32, 48, 64, 128}) {
            const TernaryMatMulShape shape = Shape(m, 384, 7, group, bits);
            CHECK(Supports(KernelFamily::kNaive, shape, type, device));
            const KernelFamily chosen = ChooseFamily(shape, type, device);
            CHECK(chosen != KernelFamily::kAuto && Supports(chosen, shape, type, device));
            const bool fast = group % 16 == 0 && m < 65535 * 16;
            CHECK((chosen != KernelFamily::kNaive) == fast);
          }
        }
      }
    }
  }
}

void TensorCoresAreChosenOnlyWhereReal() {
  const TernaryMatMulShape shape = Shape(64, 4096, 4096), floats = Shape(64, 4096, 4096, 0, 0);
  CHECK(ChooseFamily(shape, DType::kFloat16, kT4) == KernelFamily::kTileImma);
  CHECK(ChooseFamily(shape, DType::kFloat16, kGtx1660) == KernelFamily::kTileDp4a);
  CHECK(ChooseFamily(floats, DType::kFloat16, kT4) == KernelFamily::kTileHmma);
  CHECK(ChooseFamily(floats, DType::kFloat32, kT4) == KernelFamily::kTileFloat);
  CHECK(ChooseFamily(floats, DType::kFloat16, kGtx1660) == KernelFamily::kTileFloat);
  CHECK(ChooseFamily(Shape(1, 4096, 4096), DType::kFloat16, kT4) == KernelFamily::kGemvDp4a);
  CHECK(!Supports(KernelFamily::kGemvDp4a, Shape(9, 64, 4), DType::kFloat32, kT4));
  CHECK(!Supports(KernelFamily::kGemvDp4a, floats, DType::kFloat32, kT4));
  CHECK(!Supports(KernelFamily::kGemvDp4a, Shape(1, 64, 4), DType::kFloat32, DeviceInfo{75, 0}));
  CHECK(!Supports(KernelFamily::kGemvDp4a, Shape(1, 64, 4), DType::kFloat32,
                  MakeDeviceInfo("Quadro P2000", 61, 8)));
}

void WorkspaceGrowsWithM() {
  size_t last = 0;
  for (int32_t m = 1; m < 300; ++m) {
    const size_t bytes = WorkspaceBytes(Shape(m, 1000, 500, 0));
    CHECK(bytes >= last && bytes % kWorkspaceAlignment == 0);
    last = bytes;
  }
  CHECK(WorkspaceBytes(Shape(0, 1, 1)) == 0);
}

// Every family on one shape and card, launched with just the workspace asked for and not run.
void CheckLaunches(const TernaryMatMulShape& shape, const DeviceInfo& device) {
  alignas(256) static char memory[256];  // never read
  TernaryMatMulArgs args;
  args.x = args.y = args.workspace = memory;
  args.packed_weight = reinterpret_cast<uint32_t*>(memory);
  args.scale = reinterpret_cast<float*>(memory);
  args.workspace_bytes = WorkspaceBytes(shape);
  for (const DType type : {DType::kFloat32, DType::kFloat16}) {
    for (const KernelFamily family : kFamilies) {
      if (!Supports(family, shape, type, device)) continue;
      const Status status = Launch(family, shape, type, args, device, nullptr);
      if (status == Status::kOk) continue;
      std::printf("%s m=%d k=%d n=%d group=%d on %d multiprocessors: %s\n", FamilyName(family),
                  shape.m, shape.k, shape.n, shape.group_size, device.sm_count,
                  StatusString(status));
      CHECK(status == Status::kOk);
    }
  }
}

// An engine keeps the workspace that was asked for where it was built, and may run on a card with
// more multiprocessors, where more blocks share the sums. Grids and shared memory must be such as
// CUDA takes, too.
void RealSizesLaunchOnEveryCard() {
  bitnet_emulation::OnlyCheckLaunches(true);
  for (const int32_t multiprocessors : {1, 14, 22, 30, 40, 68, 72, 144}) {
    const DeviceInfo device{75, multiprocessors, true};
    for (const auto& [k, n] : {std::pair{384, 1536}, {4096, 14336}, {6912, 2560}, {768, 250112},
                               {kMaxK, 64}, {27648, 5120}, {300, 1}}) {
      for (const int32_t m : {1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 63, 64, 65, 4096, 1048560}) {
        for (const int32_t bits : {8, 0}) {
          for (const int32_t group : {0, 32, 64, 96, 128}) {
            if (group == 0 || k % group == 0) CheckLaunches(Shape(m, k, n, group, bits), device);
          }
        }
      }
    }
  }
  bitnet_emulation::OnlyCheckLaunches(false);
}

void BadArgumentsAreRefused() {
  const TernaryMatMulShape shape = Shape(16, 64, 4);
  const DeviceBuffer x(16 * 64 * 4, 0), weight(4 * 16, 0xaa), scale(4 * 4, 0), y(16 * 4 * 4, 0);
  const size_t needed = WorkspaceBytes(shape);
  const DeviceBuffer workspace(needed, 0);
  TernaryMatMulArgs good;
  good.x = x.get();
  good.packed_weight = weight.get<uint32_t>();
  good.scale = scale.get<float>();
  good.y = y.get();
  good.workspace = workspace.get();
  good.workspace_bytes = needed;
  const auto launch = [&](const TernaryMatMulArgs& args) {
    return Launch(KernelFamily::kAuto, shape, DType::kFloat32, args, kT4, nullptr);
  };
  CHECK(launch(good) == Status::kOk);
  TernaryMatMulArgs args = good;
  args.y = nullptr;
  CHECK(launch(args) == Status::kInvalidArgument);
  args = good;
  args.workspace = nullptr;
  CHECK(launch(args) == Status::kInvalidArgument);
  args = good;
  args.workspace_bytes = 255;
  CHECK(launch(args) == Status::kWorkspaceTooSmall);
  args = good;
  args.workspace = static_cast<char*>(good.workspace) + 16;
  CHECK(launch(args) == Status::kMisaligned);
  args = good;
  args.packed_weight += 1;
  CHECK(launch(args) == Status::kMisaligned);
  CHECK(Launch(KernelFamily::kGemvFloat, shape, DType::kFloat32, good, kT4, nullptr) ==
        Status::kUnsupported);
}

void NamesAreDistinct() {
  std::string seen;
  for (const KernelFamily family : kFamilies) {
    CHECK(static_cast<int32_t>(family) != 0);
    CHECK(seen.find(std::string("|") + FamilyName(family) + "|") == std::string::npos);
    seen += std::string("|") + FamilyName(family) + "|";
  }
  for (int32_t status = 0; status <= 8; ++status)
    CHECK(std::string(StatusString(static_cast<Status>(status))) != "unknown status");
}

}  // namespace

int main() {
  TensorCoresAreKnownByName();
  IllegalShapesAreRefused();
  EveryLegalShapeHasAKernel();
  TensorCoresAreChosenOnlyWhereReal();
  WorkspaceGrowsWithM();
  RealSizesLaunchOnEveryCard();
  BadArgumentsAreRefused();
  NamesAreDistinct();
  return g_failures ? 1 : 0;
}
