// Makes TernaryMatMul plugins from fields, for the ONNX parser and for engines being loaded.
#pragma once

#include <NvInferRuntime.h>

#include "fields.h"

namespace bitnet::trt {

class TernaryMatMulCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  // name: the layer's. nullptr, with the reason logged, where the fields do not fit the op.
  nvinfer1::IPluginV3* createPlugin(const char* name,
                                    const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override {
    return BuildFieldNames();
  }
  const char* getPluginName() const noexcept override { return kPluginName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }
};

}  // namespace bitnet::trt
