// Talking to the logger of a TensorRT whose version is known only at run time.
//
// TensorRT 11 put IVersionedInterface under ILogger and ILoggerFinder, which moved their virtual
// functions: a library compiled against TensorRT 10 headers that simply calls log() would call
// something else under 11, and the other way round. They are the only two classes a plugin calls
// whose layout changed (plugins/README.md says how that was compared). So neither is called
// through the headers here: the run-time type of the finder says which layout it has, and the
// function is taken from the virtual table by its index (Itanium C++ ABI, as on every Linux).

#include "logging.h"

#include <cxxabi.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <typeinfo>

namespace bitnet::trt {
namespace {

constexpr char kVersionedInterface[] = "N8nvinfer119IVersionedInterfaceE";  // mangled

// Index of findLogger() in ILoggerFinder's virtual table, which is also that of log() in
// ILogger's: alone in TensorRT 10; in 11 behind getAPILanguage, getInterfaceInfo and the two
// entries of the destructor.
constexpr int kSlotTensorRt10 = 0;
constexpr int kSlotTensorRt11 = 4;
constexpr int kSlotUnknown = -1;

std::atomic<void*> g_finder{nullptr};
std::atomic<int> g_slot{kSlotUnknown};

void** VirtualTable(void* object) { return *static_cast<void***>(object); }

bool DerivesFrom(const std::type_info* type, const char* mangled) {
  if (std::strcmp(type->name(), mangled) == 0) return true;
  if (auto* single = dynamic_cast<const abi::__si_class_type_info*>(type)) {
    return DerivesFrom(single->__base_type, mangled);
  }
  if (auto* several = dynamic_cast<const abi::__vmi_class_type_info*>(type)) {
    for (unsigned i = 0; i < several->__base_count; ++i) {
      if (DerivesFrom(several->__base_info[i].__base_type, mangled)) return true;
    }
  }
  return false;
}

int SlotOf(void* finder) {
  auto* type = static_cast<const std::type_info*>(VirtualTable(finder)[-1]);
  if (type == nullptr) return kSlotUnknown;  // that TensorRT was compiled without type information
  return DerivesFrom(type, kVersionedInterface) ? kSlotTensorRt11 : kSlotTensorRt10;
}

const char* Name(Severity severity) {
  switch (severity) {
    case Severity::kError: return "error";
    case Severity::kWarning: return "warning";
    case Severity::kInfo: return "info";
    case Severity::kVerbose: return "verbose";
  }
  return "message";
}

}  // namespace

bool SetLoggerFinder(void* finder) noexcept {
  const int slot = finder != nullptr ? SlotOf(finder) : kSlotUnknown;
  g_slot.store(slot);
  g_finder.store(finder);
  return slot != kSlotUnknown;
}

void Log(Severity severity, const std::string& message) noexcept {
  using FindLogger = void* (*)(void* self);
  using LogFunction = void (*)(void* self, int32_t severity, const char* message);

  void* finder = g_finder.load();
  const int slot = g_slot.load();
  void* logger = nullptr;
  if (finder != nullptr && slot != kSlotUnknown) {
    logger = reinterpret_cast<FindLogger>(VirtualTable(finder)[slot])(finder);
  }
  if (logger != nullptr) {
    reinterpret_cast<LogFunction>(VirtualTable(logger)[slot])(
        logger, static_cast<int32_t>(severity), message.c_str());
  } else if (severity <= Severity::kWarning) {
    std::fprintf(stderr, "[bitnet-export plugin] %s: %s\n", Name(severity), message.c_str());
  }
}

}  // namespace bitnet::trt
