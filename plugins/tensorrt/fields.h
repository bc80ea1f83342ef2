// The plugin's creation state, and how it travels in TensorRT plugin fields: as the ONNX parser
// gives node attributes when a network is built, and as this plugin serialized itself when an
// engine is loaded.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>

namespace bitnet::trt {

inline constexpr char kPluginName[] = "TernaryMatMul";
inline constexpr char kPluginVersion[] = "1";
inline constexpr char kPluginNamespace[] = "";

// Raised when a serialized plugin can no longer be read as before, or wants more workspace than
// its engine has.
inline constexpr int32_t kSerializationVersion = 2;

struct Config {
  int32_t k = 0;
  int32_t n = 0;
  int32_t group_size = 0;       // 0: one scale, or one an output
  int32_t activation_bits = 8;  // 8 or 0
  int32_t timed_m = 0;          // rows TensorRT timed the tactic with; 0: not known

  bool operator==(const Config& o) const {
    return k == o.k && n == o.n && group_size == o.group_size &&
           activation_bits == o.activation_bits && timed_m == o.timed_m;
  }
  bool operator!=(const Config& o) const { return !(*this == o); }
};

// Reads a Config. Build phase: K and N must be there, group_size and activation_bits default as
// in the ONNX schema. Runtime phase: every serialized field must be there. Unknown or repeated
// fields, wrong types or lengths and values the op does not allow give nullopt and the reason.
std::optional<Config> ParseFields(const nvinfer1::PluginFieldCollection* collection,
                                  nvinfer1::TensorRTPhase phase, std::string* error);

// The node attributes that the ONNX parser is to pass on.
const nvinfer1::PluginFieldCollection* BuildFieldNames();

// "K=2560 N=6912 group_size=0 activation_bits=8": for messages, the engine inspector and, as the
// part that depends on the attributes, for the timing cache.
std::string Describe(const Config& config);

// Owns the memory behind the fields handed to TensorRT for serialization.
class SerializedFields {
 public:
  SerializedFields() = default;
  SerializedFields(const SerializedFields&) = delete;  // the fields point into this object
  SerializedFields& operator=(const SerializedFields&) = delete;

  const nvinfer1::PluginFieldCollection* Fill(const Config& config);

 private:
  static constexpr size_t kCount = 6;
  std::array<int32_t, kCount> values_{};
  std::array<nvinfer1::PluginField, kCount> fields_{};
  nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace bitnet::trt
