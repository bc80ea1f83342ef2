// The plugin driver: usage  plugin_driver LIBRARY [NAME-PART]
// LIBRARY is a build of the plugin whose kernels run on the host.

#include "harness.h"
#include "player.h"

namespace player {

static Library* g_library = nullptr;
Library& TheLibrary() { return *g_library; }

}  // namespace player

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s LIBRARY [NAME-PART]\n", argv[0]);
    return 2;
  }
  try {
    player::Library library(argv[1]);
    player::g_library = &library;
    return harness::Run(argc > 2 ? argv[2] : "");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", argv[1], error.what());
    return 2;
  }
}
