// The ONNX Runtime kernel of bitnet::TernaryMatMul on the CPU provider: reads a node's attributes
// and constants once, when the session is created, and hands products to the CPU library.
// Registration is in register.cpp; arithmetic in ../cpu.
#ifndef BITNET_ORT_TERNARY_MATMUL_H_
#define BITNET_ORT_TERNARY_MATMUL_H_

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <memory>
#include <string>

#include "bitnet_cpu.h"

namespace bitnet_ort {

enum Input : size_t { kX = 0, kPackedWeight = 1, kScale = 2, kBias = 3, kInputs = 4 };

struct Attributes {
  int64_t K, N, group_size, activation_bits;
};

struct FreeWeights {
  void operator()(bitnet_cpu_weights* weights) const { bitnet_cpu_destroy(weights); }
};
struct FreeAllocator {
  void operator()(OrtAllocator* allocator) const { Ort::GetApi().ReleaseAllocator(allocator); }
};
using Weights = std::unique_ptr<bitnet_cpu_weights, FreeWeights>;

class TernaryMatMul {
 public:
  // Throws Ort::Exception with a sentence for the user; type is X's and Y's.
  TernaryMatMul(const OrtKernelInfo* info, bitnet_cpu_type type);

  // Called by ONNX Runtime, from several threads at once if the user runs the session so.
  OrtStatusPtr ComputeV2(OrtKernelContext* context) const noexcept;

 private:
  void compute(OrtKernelContext* context) const;
  // tensors: packed_weight, scale and bias; bias may be empty.
  Weights repack(Ort::ConstValue packed, Ort::ConstValue scale, Ort::ConstValue bias) const;
  [[noreturn]] void fail(const std::string& what) const;

  std::string name_;
  Attributes attributes_{};
  bitnet_cpu_type type_;
  std::unique_ptr<OrtAllocator, FreeAllocator> allocator_;
  Weights weights_;  // empty where an operand is not constant: repacked in every run then
};

}  // namespace bitnet_ort

#endif  // BITNET_ORT_TERNARY_MATMUL_H_
