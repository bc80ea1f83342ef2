// A check that reports and counts, for the small test programs of this folder.
#pragma once

#include <cstdio>

inline int g_failures = 0;

#define CHECK(condition)                                                     \
  do {                                                                       \
    if (!(condition)) {                                                      \
      std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);    \
      ++g_failures;                                                          \
    }                                                                        \
  } while (false)
