// Reading and writing plugin fields. Every refusal names the field and what it should have been:
// TensorRT itself only reports that no plugin was created.

#include "fields.h"

#include <cstring>
#include <limits>

#include "kernels/ternary_matmul.h"

namespace bitnet::trt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::TensorRTPhase;

struct FieldSpec {
  const char* name;
  int32_t Config::*member;
  bool required_to_build;
};

constexpr FieldSpec kAttributes[] = {
    {"K", &Config::k, true},
    {"N", &Config::n, true},
    {"group_size", &Config::group_size, false},
    {"activation_bits", &Config::activation_bits, false},
};
constexpr size_t kAttributeCount = std::size(kAttributes);
// Further fields of a serialized plugin.
constexpr char kTimedM[] = "timed_m";
constexpr char kSerialization[] = "serialization_version";

// The parser gives INT attributes as one int32; int64 is what a caller of createPlugin may pass.
bool ReadInteger(const PluginField& field, int32_t* value, std::string* error) {
  const std::string name = field.name;
  if (field.type != PluginFieldType::kINT32 && field.type != PluginFieldType::kINT64) {
    *error = "field " + name + " must be an INT32 or INT64, got PluginFieldType " +
             std::to_string(static_cast<int32_t>(field.type));
    return false;
  }
  if (field.length != 1 || field.data == nullptr) {
    *error = "field " + name + " must hold one value, got " + std::to_string(field.length);
    return false;
  }
  if (field.type == PluginFieldType::kINT32) {
    std::memcpy(value, field.data, sizeof *value);
    return true;
  }
  int64_t wide = 0;
  std::memcpy(&wide, field.data, sizeof wide);
  if (wide < std::numeric_limits<int32_t>::min() || wide > std::numeric_limits<int32_t>::max()) {
    *error = "field " + name + "=" + std::to_string(wide) + " does not fit 32 bits";
    return false;
  }
  *value = static_cast<int32_t>(wide);
  return true;
}

// plugin_version and plugin_namespace are how the parser finds this creator. It keeps them to
// itself, but who calls createPlugin with all of a node's attributes passes them along.
bool IsSelector(const PluginField& field) {
  return std::strcmp(field.name, "plugin_version") == 0 ||
         std::strcmp(field.name, "plugin_namespace") == 0;
}

bool CheckSelector(const PluginField& field, std::string* error) {
  const char* expected =
      std::strcmp(field.name, "plugin_version") == 0 ? kPluginVersion : kPluginNamespace;
  std::string given;
  if (field.type == PluginFieldType::kCHAR && field.data != nullptr && field.length > 0) {
    const auto* text = static_cast<const char*>(field.data);
    given.assign(text, strnlen(text, static_cast<size_t>(field.length)));
  } else if (field.type != PluginFieldType::kCHAR) {
    *error = std::string("field ") + field.name + " must be a string";
    return false;
  }
  if (given == expected) return true;
  *error = std::string("field ") + field.name + " is '" + given + "', this plugin is '" +
           expected + "'";
  return false;
}

bool CheckValues(const Config& config, std::string* error) {
  TernaryMatMulShape shape;
  shape.m = 1;
  shape.k = config.k;
  shape.n = config.n;
  shape.group_size = config.group_size;
  shape.activation_bits = config.activation_bits;
  const bool divides = config.group_size > 0 && config.k % config.group_size == 0;
  const int64_t scales = divides ? int64_t{config.n} * (config.k / config.group_size) : 1;
  const bool countable = scales <= std::numeric_limits<int32_t>::max();
  shape.scale_count = countable ? static_cast<int32_t>(scales) : 0;
  if (countable && CheckShape(shape) == Status::kOk && config.timed_m >= 0) return true;
  *error = Describe(config) + " is not allowed: K must be 1.." + std::to_string(kMaxK) +
           ", N at least 1, group_size 0 or a divisor of K, activation_bits 8 or 0";
  return false;
}

// Where each known field's value goes, and whether it was seen.
struct Slot {
  const char* name;
  int32_t* value;
  bool required;
  bool seen = false;
};

bool ReadInto(Slot* begin, Slot* end, const PluginField& field, std::string* error) {
  for (Slot* slot = begin; slot != end; ++slot) {
    if (std::strcmp(slot->name, field.name) != 0) continue;
    if (slot->seen) {
      *error = std::string("field ") + field.name + " is given twice";
      return false;
    }
    slot->seen = true;
    return ReadInteger(field, slot->value, error);
  }
  *error = std::string("unknown field ") + field.name +
           " (known: K, N, group_size, activation_bits)";
  return false;
}

}  // namespace

std::optional<Config> ParseFields(const nvinfer1::PluginFieldCollection* collection,
                                  TensorRTPhase phase, std::string* error) {
  if (collection == nullptr || (collection->nbFields > 0 && collection->fields == nullptr)) {
    *error = "no fields given";
    return std::nullopt;
  }
  const bool stored = phase == TensorRTPhase::kRUNTIME;
  Config config;
  int32_t serialization = 0;
  Slot slots[kAttributeCount + 2];
  Slot* end = slots;
  for (const FieldSpec& spec : kAttributes) {
    *end++ = {spec.name, &(config.*spec.member), stored || spec.required_to_build};
  }
  if (stored) {
    *end++ = {kTimedM, &config.timed_m, true};
    *end++ = {kSerialization, &serialization, true};
  }
  for (int32_t i = 0; i < collection->nbFields; ++i) {
    const PluginField& field = collection->fields[i];
    if (field.name == nullptr) {
      *error = "field " + std::to_string(i) + " has no name";
      return std::nullopt;
    }
    const bool good = IsSelector(field) ? CheckSelector(field, error)
                                        : ReadInto(slots, end, field, error);
    if (!good) return std::nullopt;
  }
  for (const Slot* slot = slots; slot != end; ++slot) {
    if (slot->required && !slot->seen) {
      *error = std::string("field ") + slot->name + " is missing";
      return std::nullopt;
    }
  }
  if (stored && serialization != kSerializationVersion) {
    *error = "the engine holds this plugin in serialization version " +
             std::to_string(serialization) + ", this library reads " +
             std::to_string(kSerializationVersion) + "; build the engine again";
    return std::nullopt;
  }
  if (!CheckValues(config, error)) return std::nullopt;
  return config;
}

const nvinfer1::PluginFieldCollection* BuildFieldNames() {
  static const auto fields = [] {
    std::array<PluginField, kAttributeCount> made;
    for (size_t i = 0; i < kAttributeCount; ++i) {
      made[i] = PluginField(kAttributes[i].name, nullptr, PluginFieldType::kINT32, 1);
    }
    return made;
  }();
  static const nvinfer1::PluginFieldCollection collection{static_cast<int32_t>(kAttributeCount),
                                                          fields.data()};
  return &collection;
}

std::string Describe(const Config& config) {
  std::string text;
  for (const FieldSpec& spec : kAttributes) {
    if (!text.empty()) text += ' ';
    text += std::string(spec.name) + '=' + std::to_string(config.*spec.member);
  }
  return text;
}

const nvinfer1::PluginFieldCollection* SerializedFields::Fill(const Config& config) {
  static_assert(kCount == kAttributeCount + 2);
  std::array<const char*, kCount> names{};
  for (size_t i = 0; i < kAttributeCount; ++i) {
    names[i] = kAttributes[i].name;
    values_[i] = config.*kAttributes[i].member;
  }
  names[kAttributeCount] = kTimedM;
  values_[kAttributeCount] = config.timed_m;
  names[kAttributeCount + 1] = kSerialization;
  values_[kAttributeCount + 1] = kSerializationVersion;
  for (size_t i = 0; i < kCount; ++i) {
    fields_[i] = PluginField(names[i], &values_[i], PluginFieldType::kINT32, 1);
  }
  collection_ = {static_cast<int32_t>(kCount), fields_.data()};
  return &collection_;
}

}  // namespace bitnet::trt
