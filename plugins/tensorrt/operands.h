// From TensorRT's tensor descriptions to the shape and type the kernels take, and back: which
// ranks, sizes and types the plugin accepts. Pure functions.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>

#include "fields.h"
#include "kernels/ternary_matmul.h"

namespace bitnet::trt {

// Positions of the tensors; an output's position continues the inputs'.
inline constexpr int32_t kInputX = 0;             // [..., K] float32 or float16, rank 2 or more
inline constexpr int32_t kInputPackedWeight = 1;  // [N, K'/16] int32, K' = K rounded up to 64
inline constexpr int32_t kInputScale = 2;         // [1], [N] or [N, K / group_size] float32
inline constexpr int32_t kInputBias = 3;          // [N] float32, optional
inline constexpr int32_t kInputsWithoutBias = 3;
inline constexpr int32_t kInputsWithBias = 4;
inline constexpr int32_t kOutputY = 0;  // [..., N] of X's type
inline constexpr int32_t kOutputs = 1;

// A size not known yet: TensorRT's wildcard.
inline constexpr int64_t kDynamic = -1;

struct Problem {
  TernaryMatMulShape shape;
  DType type = DType::kFloat32;
};

// False, with the reason, if the number of tensors is not what the op has.
bool CheckCounts(int32_t inputs, int32_t outputs, std::string* error);

// The element type tensor `position` must have, given X's type.
nvinfer1::DataType ExpectedType(int32_t position, int32_t inputs, nvinfer1::DataType x_type);

// X may be float32 or float16.
bool IsActivationType(nvinfer1::DataType type);

// Checks ranks and sizes; sizes that are kDynamic pass. inputs: one Dims a tensor.
bool CheckDims(const Config& config, const nvinfer1::Dims* inputs, int32_t count,
               std::string* error);

// Shape and type of fully known inputs. m may be 0 (an empty batch), which the kernels do not
// take: the caller has nothing to do then.
bool MakeProblem(const Config& config, const nvinfer1::Dims* inputs, int32_t count,
                 nvinfer1::DataType x_type, Problem* problem, std::string* error);

}  // namespace bitnet::trt
