// libbitnet_tensorrt_register.so: for programs that can only open a library, not register one.
//
// ONNX Runtime's TensorRT provider (trt_extra_plugin_lib_paths), Triton Inference Server's
// TensorRT backend (plugins=) and Polygraphy (--plugins) call dlopen and expect the library to
// register its creators by itself. The plugin library does not, because TensorRT's own way,
// IPluginRegistry::loadLibrary, would then find them registered twice. So this small library does
// it from outside: on being opened it looks for the TensorRT of the process and has its registry
// load the plugin library beside it. What it did or could not do goes to stderr.

#include <dlfcn.h>
#include <link.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

namespace {

constexpr char kPluginFile[] = "libbitnet_tensorrt_plugin.so";

// Index of loadLibrary() in IPluginRegistry's virtual table, by the headers of TensorRT 10.0 to
// 10.16 and 11.0 to 11.1: 11 removed functions that 10 has in front of it.
constexpr int kSlotTensorRt10 = 10;
constexpr int kSlotTensorRt11 = 6;
constexpr int kSlotUnknown = -1;

void Say(const std::string& message) {
  std::fprintf(stderr, "[bitnet-export] %s\n", message.c_str());
}

const char* FileName(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash != nullptr ? slash + 1 : path;
}

// Every TensorRT in the process: libnvinfer.so.*, also where it was opened RTLD_LOCAL.
// TensorRT-RTX, which takes no plugins in a network, counts too: it lets this be tested.
std::vector<std::string> LoadedTensorRts() {
  std::vector<std::string> paths;
  dl_iterate_phdr(
      [](dl_phdr_info* object, size_t, void* data) {
        const char* file = FileName(object->dlpi_name);
        if (std::strncmp(file, "libnvinfer.so", 13) == 0 ||
            std::strncmp(file, "libtensorrt_rtx.so", 18) == 0) {
          static_cast<std::vector<std::string>*>(data)->push_back(object->dlpi_name);
        }
        return 0;
      },
      &paths);
  return paths;
}

int SlotOf(void* library, const std::string& path) {
  const auto number = [&](const char* symbol) {
    auto* function = reinterpret_cast<int32_t (*)()>(dlsym(library, symbol));
    return function != nullptr ? function() : 0;
  };
  const int32_t major = number("getInferLibMajorVersion");
  const int32_t minor = number("getInferLibMinorVersion");
  const bool rtx = std::strstr(FileName(path.c_str()), "rtx") != nullptr;
  if (rtx ? major == 1 && minor >= 7 : major == 11) return kSlotTensorRt11;
  if (!rtx && major == 10) return kSlotTensorRt10;
  Say(path + " is version " + std::to_string(major) + "." + std::to_string(minor) + "; " +
      kPluginFile + " can be registered with TensorRT 10 and 11 only");
  return kSlotUnknown;
}

std::string PluginPath() {
  Dl_info self{};
  dladdr(reinterpret_cast<const void*>(&PluginPath), &self);
  const std::string own = self.dli_fname != nullptr ? self.dli_fname : "";
  const size_t slash = own.rfind('/');
  return (slash == std::string::npos ? "" : own.substr(0, slash + 1)) + kPluginFile;
}

void RegisterWith(const std::string& tensorrt, const std::string& plugin) {
  using LoadLibrary = void* (*)(void* self, const char* path);

  void* library = dlopen(tensorrt.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  auto* get_registry =
      library ? reinterpret_cast<void* (*)()>(dlsym(library, "getPluginRegistry")) : nullptr;
  void* registry = get_registry != nullptr ? get_registry() : nullptr;
  if (registry == nullptr) return Say(tensorrt + " has no plugin registry");
  const int slot = SlotOf(library, tensorrt);
  if (slot == kSlotUnknown) return;
  const auto load_library =
      reinterpret_cast<LoadLibrary>((*static_cast<void***>(registry))[slot]);
  if (load_library(registry, plugin.c_str()) == nullptr) {
    Say("TensorRT did not load " + plugin +
        " (its log has the reason; nothing is wrong if TernaryMatMul was registered before)");
  }
}

__attribute__((constructor)) void Register() {
  const std::vector<std::string> tensorrts = LoadedTensorRts();
  if (tensorrts.empty()) {
    Say(std::string("no TensorRT is loaded in this process yet, ") + kPluginFile +
        " is not registered");
  }
  for (const std::string& path : tensorrts) RegisterWith(path, PluginPath());
}

}  // namespace
