// The creator, and the two functions by which TensorRT finds it: the only exported symbols.

#include "creator.h"

#include <memory>
#include <string>

#include "logging.h"
#include "plugin.h"

namespace bitnet::trt {

nvinfer1::IPluginV3* TernaryMatMulCreator::createPlugin(
    const char* name, const nvinfer1::PluginFieldCollection* fields,
    nvinfer1::TensorRTPhase phase) noexcept {
  const std::string layer = name != nullptr ? name : "";
  try {
    std::string error;
    if (const std::optional<Config> config = ParseFields(fields, phase, &error)) {
      return std::make_unique<TernaryMatMulPlugin>(*config, layer).release();
    }
    Log(Severity::kError, std::string(kPluginName) + " '" + layer + "': " + error);
  } catch (const std::exception& failure) {
    Log(Severity::kError, std::string(kPluginName) + " '" + layer + "': " + failure.what());
  }
  return nullptr;
}

}  // namespace bitnet::trt

#define BITNET_EXPORT __attribute__((visibility("default")))

// Called by IPluginRegistry::loadLibrary.
extern "C" BITNET_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static bitnet::trt::TernaryMatMulCreator creator;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
  count = 1;
  return creators;
}

// Called by TensorRT when it loads the library, with what finds the logger of the day.
extern "C" BITNET_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  bitnet::trt::SetLoggerFinder(finder);
}
