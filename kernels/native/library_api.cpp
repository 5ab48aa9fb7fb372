// What the library is, its preparation and its teams.
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

#include <sys/syscall.h>
#include <unistd.h>

#include "api.h"
#include "team.h"

// The digest of the sources, set by the build.
#ifndef PIO_SOURCES
#error "build with setup.py"
#endif

namespace pio {

const char* keep_error(const char* text) {
  thread_local char kept[512];
  std::snprintf(kept, sizeof kept, "%s", text);
  return kept;
}

namespace {

#ifdef __AMX_TILE__
// Linux gives the tile registers only to processes that ask for them: once, for all threads.
void prepare() {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) {
    throw std::runtime_error(std::string("the kernel refuses the AMX tile registers: ") +
                             std::strerror(errno));
  }
}
#else
void prepare() {}
#endif

}  // namespace
}  // namespace pio

// The version of this C interface; library.py knows the one that it speaks.
PIO_API int pio_abi() { return 1; }

PIO_API const char* pio_sources() { return PIO_SOURCES; }

// Called once before any kernel. An error means that this process cannot use the library.
PIO_API const char* pio_prepare() {
  return pio::guarded([] { pio::prepare(); });
}

// Teams live as long as the process.
PIO_API const char* pio_team(int num_threads, void** team) {
  return pio::guarded([&] { *team = &pio::Team::of(num_threads); });
}
