// A source of random numbers for the C++ standard library that is linked statically.
//
// std::random_device of a libstdc++ that was built with glibc 2.36 calls arc4random. That alone would keep the programs from running
// with glibc 2.34 (RHEL 9) or 2.35 (Ubuntu 22.04), which have everything else they need. This definition goes before glibc's.

#include <sys/random.h>

#include <cerrno>
#include <cstdint>
#include <cstdlib>

extern "C" uint32_t arc4random(void) noexcept {
  uint32_t random = 0;
  ssize_t got = 0;
  do {
    got = getrandom(&random, sizeof random, 0);  // Up to 256 bytes come whole.
  } while (got < 0 && errno == EINTR);
  if (got != sizeof random) {
    std::abort();
  }
  return random;
}
