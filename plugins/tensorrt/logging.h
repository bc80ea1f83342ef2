// Messages of the plugin, to TensorRT's logger where there is one and to stderr otherwise.
#pragma once

#include <cstdint>
#include <string>

namespace bitnet::trt {

// The values of nvinfer1::ILogger::Severity.
enum class Severity : int32_t { kError = 1, kWarning = 2, kInfo = 3, kVerbose = 4 };

// finder: nvinfer1::ILoggerFinder of whichever TensorRT loaded this library, or null.
// Returns whether its layout was recognized; messages go to stderr where it was not.
bool SetLoggerFinder(void* finder) noexcept;

void Log(Severity severity, const std::string& message) noexcept;

}  // namespace bitnet::trt
