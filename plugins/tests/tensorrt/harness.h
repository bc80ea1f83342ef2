// The smallest test frame that serves: named tests, checks that say what they compared, a closing
// line with the counts. No framework is fetched for a few dozen tests.
#pragma once

#include <cstdio>
#include <functional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace harness {

struct Test {
  std::string name;
  std::function<void()> body;
};

inline std::vector<Test>& Tests() {
  static std::vector<Test> tests;
  return tests;
}

inline int& Failures() {
  static int failures = 0;  // of the test that is running
  return failures;
}

struct Registrar {
  Registrar(std::string name, std::function<void()> body) {
    Tests().push_back({std::move(name), std::move(body)});
  }
};

inline void Report(const char* file, int line, const std::string& what) {
  ++Failures();
  std::printf("  %s:%d: %s\n", file, line, what.c_str());
}

template <typename T>
std::string Show(const T& value) {
  std::ostringstream out;
  out << value;
  return out.str();
}

// Runs the tests whose name contains filter; the exit code for main.
inline int Run(const std::string& filter) {
  int passed = 0;
  int failed = 0;
  for (const Test& test : Tests()) {
    if (test.name.find(filter) == std::string::npos) continue;
    Failures() = 0;
    test.body();
    std::printf("%s %s\n", Failures() ? "FAIL" : "ok  ", test.name.c_str());
    ++(Failures() ? failed : passed);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}

}  // namespace harness

#define TEST(name)                                                        \
  static void name();                                                     \
  static const harness::Registrar registrar_##name{#name, name};          \
  static void name()

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) harness::Report(__FILE__, __LINE__, "not true: " #condition); \
  } while (false)

#define CHECK_EQ(left, right)                                             \
  do {                                                                    \
    const auto& check_left = (left);                                      \
    const auto& check_right = (right);                                    \
    if (!(check_left == check_right)) {                                   \
      harness::Report(__FILE__, __LINE__,                                 \
                      #left " is " + harness::Show(check_left) + ", expected " + \
                          harness::Show(check_right));                    \
    }                                                                     \
  } while (false)

// text contains part: for messages.
#define CHECK_SAYS(text, part)                                            \
  do {                                                                    \
    const std::string check_text = (text);                                \
    if (check_text.find(part) == std::string::npos) {                     \
      harness::Report(__FILE__, __LINE__, "'" + check_text + "' does not say '" + (part) + "'"); \
    }                                                                     \
  } while (false)
