// The plugin's operands: see operands.h.

#include "operands.h"

#include <limits>

namespace bitnet::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;

constexpr int64_t kBlock = 64;         // rows of packed_weight are padded to this many codes
constexpr int64_t kCodesPerWord = 16;  // 2-bit codes in an int32

std::string ToString(const Dims& dims) {
  std::string text = "[";
  for (int32_t i = 0; i < dims.nbDims; ++i) {
    text += (i ? ", " : "") + std::to_string(dims.d[i]);
  }
  return text + "]";
}

bool Fits(int64_t size, int64_t expected) { return size == kDynamic || size == expected; }

bool Refuse(std::string* error, const char* tensor, const std::string& wanted, const Dims& got) {
  *error = std::string(tensor) + " must be " + wanted + ", got " + ToString(got);
  return false;
}

bool CheckPackedWeight(const Config& config, const Dims& dims, std::string* error) {
  const int64_t words = (config.k + kBlock - 1) / kBlock * (kBlock / kCodesPerWord);
  if (dims.nbDims == 2 && Fits(dims.d[0], config.n) && Fits(dims.d[1], words)) return true;
  return Refuse(error, "packed_weight",
                "[" + std::to_string(config.n) + ", " + std::to_string(words) + "] int32", dims);
}

bool CheckScale(const Config& config, const Dims& dims, std::string* error) {
  const std::string n = std::to_string(config.n);
  if (config.group_size > 0) {
    const int64_t groups = config.k / config.group_size;
    if (dims.nbDims == 2 && Fits(dims.d[0], config.n) && Fits(dims.d[1], groups)) return true;
    return Refuse(error, "scale", "[" + n + ", " + std::to_string(groups) + "]", dims);
  }
  if (dims.nbDims == 1 && (Fits(dims.d[0], 1) || Fits(dims.d[0], config.n))) return true;
  return Refuse(error, "scale", "[1] or [" + n + "]", dims);
}

// Product of all but X's last dimension.
bool CountRows(const Dims& x, int32_t* rows, std::string* error) {
  int64_t product = 1;
  for (int32_t i = 0; i + 1 < x.nbDims; ++i) {
    // A negative size is a wildcard where there must be none by now.
    if (x.d[i] < 0 || (x.d[i] > 0 && product > std::numeric_limits<int32_t>::max() / x.d[i])) {
      return Refuse(error, "X", "of known size with fewer than 2^31 rows", x);
    }
    product *= x.d[i];
  }
  *rows = static_cast<int32_t>(product);
  return true;
}

}  // namespace

bool CheckCounts(int32_t inputs, int32_t outputs, std::string* error) {
  if ((inputs == kInputsWithoutBias || inputs == kInputsWithBias) && outputs == kOutputs) {
    return true;
  }
  *error = "needs inputs X, packed_weight, scale and optionally bias, and 1 output; got " +
           std::to_string(inputs) + " inputs and " + std::to_string(outputs) + " outputs";
  return false;
}

bool IsActivationType(DataType type) {
  return type == DataType::kFLOAT || type == DataType::kHALF;
}

DataType ExpectedType(int32_t position, int32_t inputs, DataType x_type) {
  if (position == kInputX || position == inputs + kOutputY) return x_type;
  return position == kInputPackedWeight ? DataType::kINT32 : DataType::kFLOAT;
}

bool CheckDims(const Config& config, const Dims* inputs, int32_t count, std::string* error) {
  if (!CheckCounts(count, kOutputs, error)) return false;
  const Dims& x = inputs[kInputX];
  if (x.nbDims < 2 || !Fits(x.d[x.nbDims - 1], config.k)) {
    return Refuse(error, "X", "[..., " + std::to_string(config.k) + "] of rank 2 or more", x);
  }
  if (!CheckPackedWeight(config, inputs[kInputPackedWeight], error)) return false;
  if (!CheckScale(config, inputs[kInputScale], error)) return false;
  if (count == kInputsWithBias) {
    const Dims& bias = inputs[kInputBias];
    if (bias.nbDims != 1 || !Fits(bias.d[0], config.n)) {
      return Refuse(error, "bias", "[" + std::to_string(config.n) + "]", bias);
    }
  }
  return true;
}

bool MakeProblem(const Config& config, const Dims* inputs, int32_t count, DataType x_type,
                 Problem* problem, std::string* error) {
  if (!IsActivationType(x_type)) {
    *error = "X must be float32 or float16";
    return false;
  }
  if (!CheckDims(config, inputs, count, error)) return false;
  TernaryMatMulShape shape;
  if (!CountRows(inputs[kInputX], &shape.m, error)) return false;
  shape.k = config.k;
  shape.n = config.n;
  shape.group_size = config.group_size;
  shape.activation_bits = config.activation_bits;
  int64_t scales = 1;
  for (int32_t i = 0; i < inputs[kInputScale].nbDims; ++i) scales *= inputs[kInputScale].d[i];
  shape.scale_count = static_cast<int32_t>(scales);
  if (shape.m > 0 && CheckShape(shape) != Status::kOk) {
    *error = "the kernels refuse X " + ToString(inputs[kInputX]) + ": " +
             StatusString(CheckShape(shape));
    return false;
  }
  *problem = {shape, x_type == DataType::kHALF ? DType::kFloat16 : DType::kFloat32};
  return true;
}

}  // namespace bitnet::trt
