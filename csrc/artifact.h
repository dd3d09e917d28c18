#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "seed_kernel.h"

namespace esper {

// Caps in bytes, as esper/leyline/artifact.py has them.
constexpr uint64_t kMaxManifest = 1 << 20;
constexpr uint64_t kMaxBlueprint = 64 << 10;
constexpr uint64_t kMaxLibrary = 256 << 20;

// The members of an artifact: views into the bytes that were parsed.
struct Members {
  std::string_view manifest;
  std::string_view blueprint;
  std::string_view forward;
  std::string_view backward;
};

// Reads a zip of exactly the four members, stored, in their order, within their caps, with
// nothing before, between or after them but the headers zip itself needs.
// Throws ArtifactCorrupt. Never reads outside of `file`, whatever is in it.
Members ParseArtifact(std::string_view file);

// What the library says of an artifact, and how its code wants to be called.
struct Expected {
  std::string path;
  std::string digest;  // SHA-256 of the file, hexadecimal
  std::string kernel_id;
  std::string torch;  // the torch that it was built for, as torch.__version__ says it
  std::string isa;    // for cpu what torch's get_cpu_capability says, for cuda "sm_90"
  std::vector<std::string> backward_inputs;
  std::vector<int64_t> gradients;
  std::string device;
  std::string dtype;
};

// Checks torch and machine, reads the file once, compares its digest, parses it, and only then
// opens its code, from a folder that only this user can enter and that is gone on return.
// Throws ArtifactMismatch, ArtifactCorrupt, or c10::Error where the code cannot be opened.
c10::intrusive_ptr<SeedKernel> OpenArtifact(const Expected& expected);

}  // namespace esper
