// Plays TensorRT's part for one TernaryMatMul layer: parse, build, time, serialize, load, run.
// The order of calls is that of NvInferRuntime.h's documentation of IPluginV3OneBuild and
// IPluginV3OneRuntime. The plugin library is opened as IPluginRegistry::loadLibrary does.
#pragma once

#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "reference.h"
#include "tensorrt_fakes.h"

namespace player {

using nvinfer1::DataType;

// The library under test, opened once; its path comes from the command line.
class Library {
 public:
  explicit Library(const std::string& path) : handle_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    if (handle_ == nullptr) throw std::runtime_error(dlerror());
    using GetCreators = nvinfer1::IPluginCreatorInterface* const* (*)(int32_t&);
    get_creators = reinterpret_cast<GetCreators>(dlsym(handle_, "getCreators"));
    // Declared with void*: a finder of another TensorRT's layout goes through it as well.
    set_logger_finder =
        reinterpret_cast<void (*)(void*)>(dlsym(handle_, "setLoggerFinder"));
    if (!get_creators || !set_logger_finder) throw std::runtime_error("symbols are missing");
    int32_t count = 0;
    creators = get_creators(count);
    creator_count = count;
    creator = dynamic_cast<nvinfer1::IPluginCreatorV3One*>(creators[0]);
    set_logger_finder(static_cast<nvinfer1::ILoggerFinder*>(&finder));
  }

  nvinfer1::IPluginCreatorInterface* const* (*get_creators)(int32_t&) = nullptr;
  void (*set_logger_finder)(void*) = nullptr;
  nvinfer1::IPluginCreatorInterface* const* creators = nullptr;
  int32_t creator_count = 0;
  nvinfer1::IPluginCreatorV3One* creator = nullptr;
  fakes::FakeLogger logger;
  fakes::FakeLoggerFinder finder{&logger};

 private:
  void* handle_;
};

Library& TheLibrary();  // opened by main

// An owned plugin and its three faces.
struct Plugin {
  explicit Plugin(nvinfer1::IPluginV3* made) : object(made) {
    if (made == nullptr) return;
    core = static_cast<nvinfer1::IPluginV3OneCore*>(
        made->getCapabilityInterface(nvinfer1::PluginCapabilityType::kCORE));
    build = static_cast<nvinfer1::IPluginV3OneBuild*>(
        made->getCapabilityInterface(nvinfer1::PluginCapabilityType::kBUILD));
    runtime = static_cast<nvinfer1::IPluginV3OneRuntime*>(
        made->getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME));
  }
  explicit operator bool() const { return object != nullptr; }

  std::unique_ptr<nvinfer1::IPluginV3> object;
  nvinfer1::IPluginV3OneCore* core = nullptr;
  nvinfer1::IPluginV3OneBuild* build = nullptr;
  nvinfer1::IPluginV3OneRuntime* runtime = nullptr;
};

inline Plugin Create(fakes::FieldList fields,
                     nvinfer1::TensorRTPhase phase = nvinfer1::TensorRTPhase::kBUILD) {
  return Plugin(TheLibrary().creator->createPlugin("layer", fields.collection(), phase));
}

inline Plugin Create(const reference::Layer& layer) {
  return Create(fakes::ParserFields(layer.k, layer.n, layer.group_size, layer.activation_bits));
}

// What an engine file holds of a plugin: its fields, copied out of the plugin.
struct Stored {
  std::vector<std::pair<std::string, int32_t>> fields;
  int32_t tactic = 0;

  explicit Stored(Plugin& plugin, int32_t chosen) : tactic(chosen) {
    const auto* collection = plugin.runtime->getFieldsToSerialize();
    for (int32_t i = 0; i < collection->nbFields; ++i) {
      const nvinfer1::PluginField& field = collection->fields[i];
      if (field.type != nvinfer1::PluginFieldType::kINT32 || field.length != 1) {
        throw std::runtime_error("a serialized field is not one INT32");
      }
      fields.emplace_back(field.name, *static_cast<const int32_t*>(field.data));
    }
  }
  fakes::FieldList list() const {
    fakes::FieldList made;
    for (const auto& [name, value] : fields) made.add(name, value);
    return made;
  }
};

// The layer's tensors at given leading sizes of X.
inline std::vector<nvinfer1::PluginTensorDesc> InputDescs(const reference::Layer& layer,
                                                          DataType type,
                                                          std::vector<int64_t> leading) {
  leading.push_back(layer.k);
  std::vector<nvinfer1::PluginTensorDesc> descs{
      fakes::MakeDesc(type, leading),
      fakes::MakeDesc(DataType::kINT32, {layer.n, layer.words()}),
      fakes::MakeDesc(DataType::kFLOAT, layer.scale_sizes())};
  if (layer.has_bias) descs.push_back(fakes::MakeDesc(DataType::kFLOAT, {layer.n}));
  return descs;
}

// The same with a range of rows, as in an optimization profile.
inline std::vector<nvinfer1::DynamicPluginTensorDesc> ProfileDescs(
    const reference::Layer& layer, DataType type, int64_t min, int64_t opt, int64_t max) {
  std::vector<nvinfer1::DynamicPluginTensorDesc> descs;
  for (const auto& desc : InputDescs(layer, type, {1})) {
    std::vector<int64_t> sizes(desc.dims.d, desc.dims.d + desc.dims.nbDims);
    descs.push_back(fakes::MakeDynamic(desc.type, sizes, sizes, sizes));
  }
  descs[0] = fakes::MakeDynamic(type, {min, layer.k}, {opt, layer.k}, {max, layer.k});
  return descs;
}

inline nvinfer1::DynamicPluginTensorDesc ProfileOutput(const reference::Layer& layer,
                                                       DataType type, int64_t min, int64_t opt,
                                                       int64_t max) {
  return fakes::MakeDynamic(type, {min, layer.n}, {opt, layer.n}, {max, layer.n});
}

// Memory with guards on both sides, poisoned, aligned as TensorRT aligns device memory.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    const size_t whole = (kGuard + bytes + kGuard + kAlignment - 1) / kAlignment * kAlignment;
    memory_.reset(static_cast<uint8_t*>(std::aligned_alloc(kAlignment, whole)));
    whole_ = whole;
    std::memset(memory_.get(), kPoison, whole);
  }
  Buffer(const void* data, size_t bytes) : Buffer(bytes) {
    if (bytes > 0) std::memcpy(this->data(), data, bytes);
  }
  void* data() { return memory_.get() + kGuard; }
  bool intact() const {
    for (size_t i = 0; i < whole_; ++i) {
      if ((i < kGuard || i >= kGuard + bytes_) && memory_.get()[i] != kPoison) return false;
    }
    return true;
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  static constexpr size_t kAlignment = 256;
  static constexpr size_t kGuard = 256;
  static constexpr uint8_t kPoison = 0xff;  // NaN in fp32 and fp16
  size_t bytes_;
  size_t whole_ = 0;
  std::unique_ptr<uint8_t, Free> memory_;
};

struct RunResult {
  int32_t code = -1;
  std::vector<float> y;
  bool intact = false;  // nothing was written beside the output and the workspace
};

// x [M, K] as the type says; the values the plugin sees, back in float.
inline std::vector<float> RoundTo(DataType type, std::vector<float> x) {
  if (type == DataType::kHALF) {
    for (float& value : x) value = reference::FromHalf(reference::ToHalf(value));
  }
  return x;
}

// One enqueue of an attached plugin after onShapeChange; leading: X's sizes before K.
inline RunResult Run(Plugin& plugin, const reference::Layer& layer, DataType type,
                     const std::vector<float>& x, const std::vector<int64_t>& leading,
                     size_t workspace_bytes) {
  std::vector<uint16_t> half(x.size());
  for (size_t i = 0; i < x.size(); ++i) half[i] = reference::ToHalf(x[i]);
  const bool narrow = type == DataType::kHALF;
  const size_t element = narrow ? 2 : 4;
  const size_t outputs = x.size() / static_cast<size_t>(layer.k) * static_cast<size_t>(layer.n);
  Buffer x_memory(narrow ? static_cast<const void*>(half.data()) : x.data(), x.size() * element);
  Buffer packed(layer.packed.data(), layer.packed.size() * 4);
  Buffer scale(layer.scale.data(), layer.scale.size() * 4);
  Buffer bias(layer.bias.data(), layer.bias.size() * 4);
  Buffer workspace(workspace_bytes);
  Buffer y(outputs * element);

  const auto in = InputDescs(layer, type, leading);
  std::vector<int64_t> y_sizes = leading;
  y_sizes.push_back(layer.n);
  const nvinfer1::PluginTensorDesc out = fakes::MakeDesc(type, y_sizes);
  const void* inputs[] = {x_memory.data(), packed.data(), scale.data(), bias.data()};
  void* output_list[] = {y.data()};

  RunResult result;
  result.code =
      plugin.runtime->onShapeChange(in.data(), static_cast<int32_t>(in.size()), &out, 1);
  if (result.code != 0) return result;
  result.code = plugin.runtime->enqueue(in.data(), &out, inputs, output_list, workspace.data(),
                                        nullptr);
  result.y.resize(outputs);
  for (size_t i = 0; i < outputs; ++i) {
    result.y[i] = narrow ? reference::FromHalf(static_cast<uint16_t*>(y.data())[i])
                         : static_cast<float*>(y.data())[i];
  }
  result.intact = y.intact() && workspace.intact() && x_memory.intact();
  return result;
}

}  // namespace player
