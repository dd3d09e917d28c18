#pragma once

#include <cstddef>
#include <string>

namespace esper {

// The SHA-256 of `size` bytes as 64 lower-case hexadecimal digits. Computed by the system's
// libcrypto where there is one, several times faster than what stands in for it elsewhere.
std::string Sha256(const unsigned char* data, size_t size);

// The stand-in (FIPS 180-4), for its test.
std::string Sha256Portable(const unsigned char* data, size_t size);

}  // namespace esper
