// A library in libnvinfer's place: it has a plugin registry of the layout of the headers it is
// compiled with, which writes down what it is asked to load. It stands for the registry of that
// TensorRT; that of the layout of 11 is tested with a real one (tests/native/test_registry.py).

#include <NvInferRuntime.h>

#include <string>

namespace {

std::string g_loaded;

class RecordingRegistry final : public nvinfer1::IPluginRegistry {
 public:
#if NV_TENSORRT_MAJOR < 11
  bool registerCreator(nvinfer1::IPluginCreator&, const char*) noexcept override { return false; }
  nvinfer1::IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept override {
    return nullptr;
  }
  nvinfer1::IPluginCreator* getPluginCreator(const char*, const char*,
                                             const char*) noexcept override {
    return nullptr;
  }
  bool deregisterCreator(const nvinfer1::IPluginCreator&) noexcept override { return false; }
#endif
  void setErrorRecorder(nvinfer1::IErrorRecorder*) noexcept override {}
  nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
  bool isParentSearchEnabled() const override { return false; }
  void setParentSearchEnabled(bool) override {}
  PluginLibraryHandle loadLibrary(const char* path) noexcept override {
    g_loaded += path;
    return &g_loaded;
  }
  void deregisterLibrary(PluginLibraryHandle) noexcept override {}
  bool registerCreator(nvinfer1::IPluginCreatorInterface&, const char*) noexcept override {
    return false;
  }
  nvinfer1::IPluginCreatorInterface* const* getAllCreators(int32_t*) const noexcept override {
    return nullptr;
  }
  nvinfer1::IPluginCreatorInterface* getCreator(const char*, const char*,
                                                const char*) noexcept override {
    return nullptr;
  }
  bool deregisterCreator(const nvinfer1::IPluginCreatorInterface&) noexcept override {
    return false;
  }
  nvinfer1::IPluginResource* acquirePluginResource(const char*,
                                                   nvinfer1::IPluginResource*) noexcept override {
    return nullptr;
  }
  int32_t releasePluginResource(const char*) noexcept override { return 0; }
  // Not in the headers before 10.10, hence no override.
  virtual nvinfer1::IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t*) noexcept {
    return nullptr;
  }
};

}  // namespace

extern "C" {

nvinfer1::IPluginRegistry* getPluginRegistry() noexcept {
  static RecordingRegistry registry;
  return &registry;
}
int32_t getInferLibMajorVersion() noexcept { return NV_TENSORRT_MAJOR; }
int32_t getInferLibMinorVersion() noexcept { return NV_TENSORRT_MINOR; }

const char* loaded_path() { return g_loaded.c_str(); }  // for the test
}
