#include "sha256.h"

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>

#include <dlfcn.h>

#include "fork.h"

namespace esper {
namespace {

using Digest = std::array<unsigned char, 32>;
using OneShot = unsigned char* (*)(const unsigned char*, size_t, unsigned char*);

// Fractional parts of the cube roots of the first 64 primes.
constexpr uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

void Compress(uint32_t (&state)[8], const unsigned char* block) {
  uint32_t w[64];
  for (int i = 0; i < 16; ++i) {
    w[i] = uint32_t{block[4 * i]} << 24 | uint32_t{block[4 * i + 1]} << 16 |
           uint32_t{block[4 * i + 2]} << 8 | uint32_t{block[4 * i + 3]};
  }
  for (int i = 16; i < 64; ++i) {
    const uint32_t x = w[i - 15], y = w[i - 2];
    w[i] = w[i - 16] + (std::rotr(x, 7) ^ std::rotr(x, 18) ^ (x >> 3)) + w[i - 7] +
           (std::rotr(y, 17) ^ std::rotr(y, 19) ^ (y >> 10));
  }
  auto [a, b, c, d, e, f, g, h] = state;
  for (int i = 0; i < 64; ++i) {
    const uint32_t up = h + (std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25)) +
                        ((e & f) ^ (~e & g)) + kRound[i] + w[i];
    const uint32_t down =
        (std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
    h = g, g = f, f = e, e = d + up, d = c, c = b, b = a, a = up + down;
  }
  const uint32_t mixed[8] = {a, b, c, d, e, f, g, h};
  for (int i = 0; i < 8; ++i) state[i] += mixed[i];
}

Digest Portable(const unsigned char* data, size_t size) {
  uint32_t state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                       0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  size_t at = 0;
  for (; size - at >= 64; at += 64) Compress(state, data + at);
  // The rest, a one bit, zeros, and the length in bits: one block or two.
  unsigned char tail[128] = {};
  const size_t rest = size - at, length = rest < 56 ? 64 : 128;
  if (rest != 0) std::memcpy(tail, data + at, rest);
  tail[rest] = 0x80;
  for (size_t i = 0; i < 8; ++i) {
    tail[length - 1 - i] = static_cast<unsigned char>(uint64_t{size} * 8 >> (8 * i));
  }
  for (size_t i = 0; i < length; i += 64) Compress(state, tail + i);
  Digest digest;
  for (size_t i = 0; i < 32; ++i) {
    digest[i] = static_cast<unsigned char>(state[i / 4] >> (24 - 8 * (i % 4)));
  }
  return digest;
}

std::string Hex(const Digest& digest) {
  std::string text;
  for (const unsigned char byte : digest) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

OneShot FromLibcrypto() {
  const NoFork no_fork;
  // Of either version the function has been the same for twenty years. Never closed again.
  for (const char* name : {"libcrypto.so.3", "libcrypto.so.1.1"}) {
    if (void* const library = dlopen(name, RTLD_NOW | RTLD_LOCAL)) {
      if (void* const symbol = dlsym(library, "SHA256")) return reinterpret_cast<OneShot>(symbol);
    }
  }
  return nullptr;
}

}  // namespace

std::string Sha256Portable(const unsigned char* data, size_t size) {
  return Hex(Portable(data, size));
}

std::string Sha256(const unsigned char* data, size_t size) {
  static const OneShot libcrypto = FromLibcrypto();
  Digest digest;
  if (libcrypto == nullptr || libcrypto(data, size, digest.data()) == nullptr) {
    return Sha256Portable(data, size);
  }
  return Hex(digest);
}

}  // namespace esper
