// Tactics: see tactics.h.

#include "tactics.h"

#include <algorithm>
#include <iterator>

namespace bitnet::trt {
namespace {

bool IsOffered(KernelFamily family) {
  return family != KernelFamily::kAuto && family != KernelFamily::kNaive;
}

}  // namespace

std::vector<int32_t> ValidTactics(const Problem& problem, const DeviceInfo& device) {
  std::vector<int32_t> tactics;
  for (const KernelFamily family : kFamilies) {
    if (IsOffered(family) && Supports(family, problem.shape, problem.type, device)) {
      tactics.push_back(static_cast<int32_t>(family));
    }
  }
  return tactics;
}

bool IsTactic(int32_t id) {
  const auto family = static_cast<KernelFamily>(id);
  return family == KernelFamily::kAuto ||
         (IsOffered(family) &&
          std::find(std::begin(kFamilies), std::end(kFamilies), family) != std::end(kFamilies));
}

KernelFamily FamilyToLaunch(int32_t tactic, int32_t timed_m, const Problem& problem,
                            const DeviceInfo& device) {
  const KernelFamily automatic = ChooseFamily(problem.shape, problem.type, device);
  const auto timed = static_cast<KernelFamily>(tactic);
  if (timed == KernelFamily::kAuto || timed_m < 1 ||
      !Supports(timed, problem.shape, problem.type, device)) {
    return automatic;
  }
  TernaryMatMulShape timed_shape = problem.shape;
  timed_shape.m = timed_m;
  return ChooseFamily(timed_shape, problem.type, device) == automatic ? timed : automatic;
}

}  // namespace bitnet::trt
