// TensorRT's side of the plugin interface, as far as a plugin can see it, over the real headers.
//
// FakeExprBuilder stands for the symbolic sizes of a network with dynamic shapes; FakeLogger and
// FakeLoggerFinder for the logger TensorRT 10 hands to a plugin library; FieldList for the fields
// the ONNX parser makes of node attributes (INT -> one INT32, STRING -> CHAR; only attributes the
// creator names; order of the creator's list). Real TensorRT also times tactics and places
// tensors; that is not modelled.
#pragma once

#include <NvInferRuntime.h>

#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace fakes {

class FakeExpr final : public nvinfer1::IDimensionExpr, public nvinfer1::apiv::VDimensionExpr {
 public:
  FakeExpr(bool constant, int64_t value) : constant_(constant), value_(value) { mImpl = this; }
  bool isConstant() const override { return constant_; }
  int64_t getConstantValue() const override { return value_; }
  bool isSizeTensor() const override { return false; }

 private:
  bool constant_;
  int64_t value_;
};

class FakeExprBuilder final : public nvinfer1::IExprBuilder, public nvinfer1::apiv::VExprBuilder {
 public:
  FakeExprBuilder() { mImpl = this; }
  const nvinfer1::IDimensionExpr* constant(int64_t value) override {
    return &expressions_.emplace_back(true, value);
  }
  const nvinfer1::IDimensionExpr* operation(nvinfer1::DimensionOperation,
                                            const nvinfer1::IDimensionExpr&,
                                            const nvinfer1::IDimensionExpr&) override {
    return symbol();
  }
  const nvinfer1::IDimensionExpr* declareSizeTensor(int32_t, const nvinfer1::IDimensionExpr&,
                                                    const nvinfer1::IDimensionExpr&) override {
    return symbol();
  }
  const nvinfer1::IDimensionExpr* symbol() { return &expressions_.emplace_back(false, 0); }

  // sizes: -1 for a dynamic one.
  nvinfer1::DimsExprs dims(const std::vector<int64_t>& sizes) {
    nvinfer1::DimsExprs made{};
    made.nbDims = static_cast<int32_t>(sizes.size());
    for (size_t i = 0; i < sizes.size(); ++i) {
      made.d[i] = sizes[i] < 0 ? symbol() : static_cast<nvinfer1::apiv::VExprBuilder*>(this)->constant(sizes[i]);
    }
    return made;
  }

 private:
  std::deque<FakeExpr> expressions_;
};

class FakeLogger final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    severities.push_back(severity);
    messages.emplace_back(message);
  }
  std::string last() const { return messages.empty() ? "" : messages.back(); }

  std::vector<Severity> severities;
  std::vector<std::string> messages;
};

class FakeLoggerFinder final : public nvinfer1::ILoggerFinder {
 public:
  explicit FakeLoggerFinder(nvinfer1::ILogger* logger) : logger_(logger) {}
  nvinfer1::ILogger* findLogger() override { return logger_; }

 private:
  nvinfer1::ILogger* logger_;
};

// Owns field values and names.
class FieldList {
 public:
  FieldList& add(const std::string& name, int64_t value, bool wide = false) {
    names_.push_back(name);
    if (wide) {
      wides_.push_back(value);
      fields_.emplace_back(names_.back().c_str(), &wides_.back(),
                           nvinfer1::PluginFieldType::kINT64, 1);
    } else {
      narrows_.push_back(static_cast<int32_t>(value));
      fields_.emplace_back(names_.back().c_str(), &narrows_.back(),
                           nvinfer1::PluginFieldType::kINT32, 1);
    }
    return *this;
  }
  FieldList& add_text(const std::string& name, const std::string& value) {
    names_.push_back(name);
    texts_.push_back(value);
    fields_.emplace_back(names_.back().c_str(), texts_.back().data(),
                         nvinfer1::PluginFieldType::kCHAR, static_cast<int32_t>(value.size()));
    return *this;
  }
  FieldList& add_raw(const nvinfer1::PluginField& field) {
    fields_.push_back(field);
    return *this;
  }
  const nvinfer1::PluginFieldCollection* collection() {
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    return &collection_;
  }

 private:
  std::deque<std::string> names_;
  std::deque<std::string> texts_;
  std::deque<int32_t> narrows_;
  std::deque<int64_t> wides_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

inline FieldList ParserFields(int64_t k, int64_t n, int64_t group_size = 0, int64_t bits = 8) {
  FieldList fields;
  fields.add("K", k).add("N", n).add("group_size", group_size).add("activation_bits", bits);
  return fields;
}

inline nvinfer1::Dims MakeDims(const std::vector<int64_t>& sizes) {
  nvinfer1::Dims dims{};
  dims.nbDims = static_cast<int32_t>(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) dims.d[i] = sizes[i];
  return dims;
}

// The description of one tensor while an engine is built.
inline nvinfer1::DynamicPluginTensorDesc MakeDynamic(
    nvinfer1::DataType type, const std::vector<int64_t>& min, const std::vector<int64_t>& opt,
    const std::vector<int64_t>& max,
    nvinfer1::TensorFormat format = nvinfer1::TensorFormat::kLINEAR) {
  std::vector<int64_t> wildcards(min.size());
  for (size_t i = 0; i < min.size(); ++i) wildcards[i] = min[i] == max[i] ? min[i] : -1;
  nvinfer1::DynamicPluginTensorDesc desc{};
  desc.desc.dims = MakeDims(wildcards);
  desc.desc.type = type;
  desc.desc.format = format;
  desc.min = MakeDims(min);
  desc.opt = MakeDims(opt);
  desc.max = MakeDims(max);
  return desc;
}

// The description of one tensor while an engine runs.
inline nvinfer1::PluginTensorDesc MakeDesc(nvinfer1::DataType type,
                                           const std::vector<int64_t>& sizes) {
  nvinfer1::PluginTensorDesc desc{};
  desc.dims = MakeDims(sizes);
  desc.type = type;
  desc.format = nvinfer1::TensorFormat::kLINEAR;
  return desc;
}

}  // namespace fakes
