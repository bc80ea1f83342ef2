// The plugin's messages under both layouts of TensorRT's logger.
//
// TensorRT 11 put IVersionedInterface under ILogger and ILoggerFinder. The classes here are laid
// out as in the headers of 10.0-10.16 and of 11.0-11.1 (compiled and compared; see
// plugins/README.md), whichever headers the test is compiled with.

#include "harness.h"
#include "player.h"

namespace {

using player::TheLibrary;

struct Message {
  int32_t severity = -1;
  std::string text;
};

namespace tensorrt10 {

class Logger {
 public:
  virtual void log(int32_t severity, const char* message) noexcept { last = {severity, message}; }
  virtual ~Logger() = default;
  Message last;
};

class LoggerFinder {
 public:
  explicit LoggerFinder(Logger* logger) : logger_(logger) {}
  virtual Logger* findLogger() { return logger_; }
  virtual ~LoggerFinder() = default;

 private:
  Logger* logger_;
};

}  // namespace tensorrt10

namespace tensorrt11 {

class Logger : public nvinfer1::IVersionedInterface {
 public:
  nvinfer1::InterfaceInfo getInterfaceInfo() const noexcept override { return {"ILogger", 1, 0}; }
  virtual void log(int32_t severity, const char* message) noexcept { last = {severity, message}; }
  Message last;
};

class LoggerFinder : public nvinfer1::IVersionedInterface {
 public:
  explicit LoggerFinder(Logger* logger) : logger_(logger) {}
  nvinfer1::InterfaceInfo getInterfaceInfo() const noexcept override {
    return {"ILoggerFinder", 1, 0};
  }
  virtual Logger* findLogger() { return logger_; }

 private:
  Logger* logger_;
};

// TensorRT hands over objects of classes derived from these.
class InternalFinder final : public LoggerFinder {
  using LoggerFinder::LoggerFinder;
};

}  // namespace tensorrt11

// Makes the creator complain while finder is set; what arrived at logger.
template <typename Finder, typename Logger>
Message ComplainTo(Finder& finder, Logger& logger) {
  player::Library& library = TheLibrary();
  library.set_logger_finder(&finder);
  const nvinfer1::PluginFieldCollection none{};
  CHECK(library.creator->createPlugin("probe", &none, nvinfer1::TensorRTPhase::kBUILD) == nullptr);
  library.set_logger_finder(static_cast<nvinfer1::ILoggerFinder*>(&library.finder));
  return logger.last;
}

TEST(messages_reach_a_tensorrt_10_logger) {
  tensorrt10::Logger logger;
  tensorrt10::LoggerFinder finder(&logger);
  const Message message = ComplainTo(finder, logger);
  CHECK_EQ(message.severity, 1);
  CHECK_SAYS(message.text, "TernaryMatMul 'probe': field K is missing");
}

TEST(messages_reach_a_tensorrt_11_logger) {
  tensorrt11::Logger logger;
  tensorrt11::InternalFinder finder(&logger);
  const Message message = ComplainTo(finder, logger);
  CHECK_EQ(message.severity, 1);
  CHECK_SAYS(message.text, "TernaryMatMul 'probe': field K is missing");
}

TEST(no_logger_is_no_crash) {
  tensorrt10::LoggerFinder finder(nullptr);
  tensorrt10::Logger unused;
  CHECK_EQ(ComplainTo(finder, unused).severity, -1);  // goes to stderr
  player::Library& library = TheLibrary();
  library.set_logger_finder(nullptr);
  const nvinfer1::PluginFieldCollection none{};
  CHECK(library.creator->createPlugin("probe", &none, nvinfer1::TensorRTPhase::kBUILD) == nullptr);
  library.set_logger_finder(static_cast<nvinfer1::ILoggerFinder*>(&library.finder));
}

}  // namespace
