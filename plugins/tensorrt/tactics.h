// Which kernel families TensorRT is offered as tactics, and which one a launch then uses.
// Pure functions of shape, type and device.
#pragma once

#include <cstdint>
#include <vector>

#include "operands.h"

namespace bitnet::trt {

// The families that can run the problem, as tactic ids: unique and non-zero. TensorRT times each
// on the user's own card at the profile's optimum. The naive reference kernel is not offered.
std::vector<int32_t> ValidTactics(const Problem& problem, const DeviceInfo& device);

// Whether id is one this library ever offers; 0 stands for TensorRT's default tactic.
bool IsTactic(int32_t id);

// The family for a launch. A timing taken with timed_m rows says nothing about a shape on the
// other side of a change of regime (one row against a hundred): the tactic is used only where
// the automatic choice would be the same for both sizes, and only where it can run the shape.
KernelFamily FamilyToLaunch(int32_t tactic, int32_t timed_m, const Problem& problem,
                            const DeviceInfo& device);

}  // namespace bitnet::trt
