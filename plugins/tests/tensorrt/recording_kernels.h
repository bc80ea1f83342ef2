// The kernels' launch interface, answering by simple rules and writing down what it was asked.
//
// Stands for ../../kernels where a test is about the plugin's decisions: which device is there,
// what Supports says, whether a launch fails. It computes nothing.
#pragma once

#include <vector>

#include "kernels/ternary_matmul.h"

namespace recording {

struct LaunchRecord {
  bitnet::KernelFamily family;
  bitnet::TernaryMatMulShape shape;
  bitnet::DType type;
  bitnet::TernaryMatMulArgs args;
  bitnet::Stream stream;
};

struct State {
  bitnet::DeviceInfo device{75, 40, true};
  bitnet::Status query_status = bitnet::Status::kOk;
  bitnet::Status launch_status = bitnet::Status::kOk;
  int queries = 0;
  LaunchRecord last{};
  int launches = 0;
};

inline State& TheState() {
  static State state;
  return state;
}

}  // namespace recording
