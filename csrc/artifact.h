#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "launch_plan.h"
#include "seed_kernel.h"

namespace esper {

// Caps in bytes, as esper/leyline/artifact.py has them.
constexpr uint64_t kMaxManifest = 1 << 20;
constexpr uint64_t kMaxBlueprint = 64 << 10;
constexpr uint64_t kMaxLibrary = 256 << 20;
constexpr uint64_t kMaxPlan = 1 << 20;
constexpr uint64_t kMaxCubins = 64 << 20;

// Which two members are the code: forward.so and backward.so, or plan.json and kernels.cubin.
enum class Layout { kLibraries, kCubins };

// The members of an artifact: views into the bytes that were parsed.
struct Members {
  Layout layout = Layout::kLibraries;
  std::string_view manifest;
  std::string_view blueprint;
  std::array<std::string_view, 2> code;

  // The names of all four, in their order.
  std::array<std::string_view, 4> names() const;
};

// Reads a zip of exactly the four members of a layout, stored, in their order, within their caps,
// with nothing before, between or after them but the headers zip itself needs. The checksum of
// the manifest is compared, for of the other members it holds digests.
// Throws ArtifactCorrupt. Never reads outside of `file`, whatever is in it.
Members ParseArtifact(std::string_view file);

// An artifact in memory. Neither copied nor moved: `members` are views into `file`.
//
// Invariant: `digest` is the SHA-256 of `file`, and `file` was parsed. What the manifest says is
// for Python to check (esper/kasmina/artifact.py), before OpenArtifact is called.
struct Artifact {
  Artifact(std::string content, const std::string& path, const std::string& digest);
  Artifact(const Artifact&) = delete;
  Artifact& operator=(const Artifact&) = delete;

  const std::string file;
  const std::string digest;
  const Members members;
  // SHA-256 of the members that the manifest has digests of, in their order.
  const std::array<std::string, 3> digests;
};

// Reads the file at `path` once. Throws ArtifactCorrupt where it is too large, no plain file, of
// another SHA-256 than `digest`, or no artifact; std::system_error where it cannot be read.
std::shared_ptr<const Artifact> ReadArtifact(const std::string& path, const std::string& digest);

// How compiled code wants to be called, see SeedKernel.
struct Convention {
  std::vector<std::string> backward_inputs;
  std::vector<int64_t> gradients;
  std::string device;
  std::string dtype;
  std::vector<std::vector<int64_t>> shapes;
  std::optional<RawPlan> plan;  // of the artifact's cubins, checked against them; none: libraries
};

// Opens the code of an artifact: libraries from a folder that only this user can enter and that
// is gone on return, cubins from memory. Throws c10::ValueError where the plan is missing or one
// too many, c10::Error where the code cannot be opened, std::system_error where there is no place.
c10::intrusive_ptr<SeedKernel> OpenArtifact(const Artifact& artifact,
                                            const Convention& convention);

}  // namespace esper
