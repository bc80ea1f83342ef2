// usage: plugin_register LIBNVINFER REGISTER-LIBRARY
// Opens both as a program with TensorRT would, the first out of the global scope, and looks at
// what TensorRT was asked to load.

#include <dlfcn.h>

#include <cstdio>
#include <string>

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  void* nvinfer = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  void* registering = nvinfer != nullptr ? dlopen(argv[2], RTLD_NOW | RTLD_LOCAL) : nullptr;
  if (registering == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 2;
  }
  auto* loaded_path = reinterpret_cast<const char* (*)()>(dlsym(nvinfer, "loaded_path"));
  const std::string own = argv[2];
  const std::string expected =
      own.substr(0, own.rfind('/') + 1) + "libbitnet_tensorrt_plugin.so";
  const std::string loaded = loaded_path();
  std::printf("loaded '%s', expected '%s'\n", loaded.c_str(), expected.c_str());
  return loaded == expected ? 0 : 1;
}
