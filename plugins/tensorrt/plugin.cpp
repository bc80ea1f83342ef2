// The plugin: see plugin.h. Methods stand in the order in which TensorRT calls them.

#include "plugin.h"

#include <algorithm>
#include <array>
#include <memory>
#include <utility>

#include "logging.h"
#include "tactics.h"

namespace bitnet::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginCapability;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginTensorDesc;

using InputDims = std::array<Dims, kInputsWithBias>;

// One Dims an input, of a description TensorRT gives in several forms.
template <typename Desc, typename Select>
InputDims GatherDims(const Desc* in, int32_t count, Select select) {
  InputDims dims{};
  for (int32_t i = 0; i < std::min(count, kInputsWithBias); ++i) dims[i] = select(in[i]);
  return dims;
}

Dims KnownDims(const DimsExprs& expressions) {
  Dims dims{};
  dims.nbDims = expressions.nbDims;
  for (int32_t i = 0; i < expressions.nbDims; ++i) {
    const nvinfer1::IDimensionExpr* size = expressions.d[i];
    dims.d[i] = size != nullptr && size->isConstant() ? size->getConstantValue() : kDynamic;
  }
  return dims;
}

}  // namespace

TernaryMatMulPlugin::TernaryMatMulPlugin(const Config& config, std::string name)
    : config_(config), name_(std::move(name)) {}

IPluginCapability* TernaryMatMulPlugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
  switch (type) {
    case PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* TernaryMatMulPlugin::clone() noexcept {
  try {
    auto copy = std::make_unique<TernaryMatMulPlugin>(config_, name_);
    copy->tactic_ = tactic_;
    copy->input_count_ = input_count_;
    copy->configured_ = configured_;
    copy->device_ = device_;
    return copy.release();
  } catch (const std::exception& error) {
    Fail(std::string("cannot be cloned: ") + error.what());
    return nullptr;
  }
}

int32_t TernaryMatMulPlugin::getOutputDataTypes(DataType* output_types, int32_t outputs,
                                                const DataType* input_types,
                                                int32_t inputs) const noexcept {
  std::string error;
  if (!CheckCounts(inputs, outputs, &error)) return Fail(error);
  if (!IsActivationType(input_types[kInputX])) return Fail("X must be float32 or float16");
  for (int32_t i = kInputPackedWeight; i < inputs; ++i) {
    if (input_types[i] != ExpectedType(i, inputs, input_types[kInputX])) {
      return Fail(i == kInputPackedWeight ? "packed_weight must be int32"
                                          : "scale and bias must be float32");
    }
  }
  output_types[kOutputY] = input_types[kInputX];
  return 0;
}

int32_t TernaryMatMulPlugin::getOutputShapes(const DimsExprs* inputs, int32_t input_count,
                                             const DimsExprs*, int32_t, DimsExprs* outputs,
                                             int32_t output_count,
                                             nvinfer1::IExprBuilder& builder) noexcept {
  std::string error;
  if (!CheckCounts(input_count, output_count, &error)) return Fail(error);
  const InputDims dims = GatherDims(inputs, input_count, KnownDims);
  if (!CheckDims(config_, dims.data(), input_count, &error)) return Fail(error);
  outputs[kOutputY] = inputs[kInputX];  // leading sizes stay symbolic
  outputs[kOutputY].d[inputs[kInputX].nbDims - 1] = builder.constant(config_.n);
  return 0;
}

bool TernaryMatMulPlugin::supportsFormatCombination(int32_t position,
                                                    const DynamicPluginTensorDesc* in_out,
                                                    int32_t inputs, int32_t outputs) noexcept {
  std::string error;
  if (!CheckCounts(inputs, outputs, &error) || position < 0 || position >= inputs + outputs) {
    return false;
  }
  const PluginTensorDesc& tensor = in_out[position].desc;
  if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
  if (position == kInputX) return IsActivationType(tensor.type);
  return tensor.type == ExpectedType(position, inputs, in_out[kInputX].desc.type);
}

int32_t TernaryMatMulPlugin::configurePlugin(const DynamicPluginTensorDesc* in, int32_t inputs,
                                             const DynamicPluginTensorDesc*,
                                             int32_t outputs) noexcept {
  std::string error;
  if (!CheckCounts(inputs, outputs, &error)) return Fail(error);
  const DataType x_type = in[kInputX].desc.type;
  const InputDims largest = GatherDims(in, inputs, [](const auto& desc) { return desc.max; });
  // A tensor of fixed size has no need of an optimum; the largest stands in where none is given.
  const InputDims optimum = GatherDims(in, inputs, [](const auto& desc) {
    return desc.opt.nbDims == desc.max.nbDims ? desc.opt : desc.max;
  });
  Problem problem;
  if (!MakeProblem(config_, largest.data(), inputs, x_type, &problem, &error) ||
      !MakeProblem(config_, optimum.data(), inputs, x_type, &problem, &error)) {
    return Fail(error);
  }
  configured_ = problem;
  input_count_ = inputs;
  config_.timed_m = problem.shape.m;
  return 0;
}

size_t TernaryMatMulPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t inputs,
                                             const DynamicPluginTensorDesc*,
                                             int32_t outputs) const noexcept {
  std::string error;
  Problem problem;
  const InputDims largest = GatherDims(in, inputs, [](const auto& desc) { return desc.max; });
  if (!CheckCounts(inputs, outputs, &error) ||
      !MakeProblem(config_, largest.data(), inputs, in[kInputX].desc.type, &problem, &error)) {
    Fail(error);
    return 0;
  }
  return problem.shape.m == 0 ? 0 : WorkspaceBytes(problem.shape);
}

std::vector<int32_t> TernaryMatMulPlugin::ConfiguredTactics() const {
  if (!configured_ || configured_->shape.m == 0 || !KnowDevice()) return {};
  return ValidTactics(*configured_, *device_);
}

int32_t TernaryMatMulPlugin::getNbTactics() noexcept {
  return static_cast<int32_t>(ConfiguredTactics().size());
}

int32_t TernaryMatMulPlugin::getValidTactics(int32_t* tactics, int32_t count) noexcept {
  const std::vector<int32_t> valid = ConfiguredTactics();
  if (count != static_cast<int32_t>(valid.size())) {
    return Fail("asked for " + std::to_string(count) + " tactics, has " +
                std::to_string(valid.size()));
  }
  std::copy(valid.begin(), valid.end(), tactics);
  return 0;
}

// TensorRT adds shapes and formats itself. The device is in it because a cache file may be moved
// between cards of one compute capability, of which some have tensor cores and some do not.
const char* TernaryMatMulPlugin::getTimingCacheID() noexcept {
  if (!KnowDevice()) return nullptr;  // nothing to key a timing by: do not cache it
  timing_cache_id_ = Describe(config_) + " kernels=" + std::to_string(kKernelVersion) +
                     " sm=" + std::to_string(device_->sm) +
                     " tensor_cores=" + (device_->real_tensor_cores ? "1" : "0");
  return timing_cache_id_.c_str();
}

const char* TernaryMatMulPlugin::getMetadataString() noexcept {
  metadata_ = Describe(config_);
  return metadata_.c_str();
}

int32_t TernaryMatMulPlugin::setTactic(int32_t tactic) noexcept {
  if (!IsTactic(tactic)) {
    return Fail("tactic " + std::to_string(tactic) +
                " is none of this library's: the engine was built with another version of it");
  }
  tactic_ = tactic;
  Log(Severity::kVerbose, std::string(kPluginName) + " '" + name_ + "': tactic " +
                              FamilyName(static_cast<KernelFamily>(tactic)) + ", timed with " +
                              std::to_string(config_.timed_m) + " rows");
  return 0;
}

nvinfer1::IPluginV3* TernaryMatMulPlugin::attachToContext(
    nvinfer1::IPluginResourceContext*) noexcept {
  return clone();  // no per-context resources: the workspace is TensorRT's
}

int32_t TernaryMatMulPlugin::onShapeChange(const PluginTensorDesc* in, int32_t inputs,
                                           const PluginTensorDesc*, int32_t outputs) noexcept {
  std::string error;
  if (!CheckCounts(inputs, outputs, &error)) return Fail(error);
  const InputDims dims = GatherDims(in, inputs, [](const auto& desc) { return desc.dims; });
  Problem problem;
  if (!MakeProblem(config_, dims.data(), inputs, in[kInputX].type, &problem, &error)) {
    return Fail(error);
  }
  input_count_ = inputs;
  return KnowDevice() ? 0 : 1;
}

// Runs on the host's critical path and possibly under graph capture: no allocation, no
// synchronization, no query of the driver (onShapeChange has been called and did that).
int32_t TernaryMatMulPlugin::enqueue(const PluginTensorDesc* input_desc, const PluginTensorDesc*,
                                     const void* const* inputs, void* const* outputs,
                                     void* workspace, cudaStream_t stream) noexcept {
  std::string error;  // empty: nothing is allocated unless something is wrong
  const InputDims dims =
      GatherDims(input_desc, input_count_, [](const auto& desc) { return desc.dims; });
  Problem problem;
  if (!MakeProblem(config_, dims.data(), input_count_, input_desc[kInputX].type, &problem,
                   &error)) {
    return Fail(error);
  }
  if (problem.shape.m == 0) return 0;  // an empty batch
  if (!KnowDevice()) return 1;

  TernaryMatMulArgs args;
  args.x = inputs[kInputX];
  args.packed_weight = static_cast<const uint32_t*>(inputs[kInputPackedWeight]);
  args.scale = static_cast<const float*>(inputs[kInputScale]);
  if (input_count_ == kInputsWithBias) args.bias = static_cast<const float*>(inputs[kInputBias]);
  args.y = outputs[kOutputY];
  args.workspace = workspace;
  // TensorRT holds at least what getWorkspaceSize said for the profile's largest shape, be it that
  // it was asked on another card.
  args.workspace_bytes = WorkspaceBytes(problem.shape);

  const KernelFamily family = FamilyToLaunch(tactic_, config_.timed_m, problem, *device_);
  const Status status =
      Launch(family, problem.shape, problem.type, args, *device_, stream);
  if (status == Status::kOk) return 0;
  return Fail(std::string("kernel ") + FamilyName(family) + " with M=" +
              std::to_string(problem.shape.m) + ": " + StatusString(status));
}

const nvinfer1::PluginFieldCollection* TernaryMatMulPlugin::getFieldsToSerialize() noexcept {
  return serialized_.Fill(config_);
}

int32_t TernaryMatMulPlugin::Fail(const std::string& what) const noexcept {
  Log(Severity::kError,
      std::string(kPluginName) + (name_.empty() ? "" : " '" + name_ + "'") + ": " + what);
  return 1;
}

bool TernaryMatMulPlugin::KnowDevice() const noexcept {
  if (device_) return true;
  DeviceInfo device;
  const Status status = QueryDevice(&device);
  if (status != Status::kOk) {
    Fail(std::string("the CUDA device cannot be queried: ") + StatusString(status));
    return false;
  }
  device_ = device;
  return true;
}

}  // namespace bitnet::trt
