#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include <ATen/core/Tensor.h>

#include "seed_kernel.h"

namespace esper {

// A launch plan in plain values, as esper/kasmina/launches.py makes it of plan.json, which
// esper/leyline/launch.py explains.
using RawExtent = std::tuple<int64_t, int64_t, int64_t>;  // times, over, plus
using RawArgument = std::tuple<std::string, size_t, RawExtent>;  // "in", "buf" or "number"
using RawLaunch = std::tuple<size_t, std::array<RawExtent, 3>, std::vector<RawArgument>>;
using RawBuffer = std::tuple<std::vector<int64_t>, bool, std::string>;
using RawHalf = std::tuple<size_t, size_t, std::vector<RawBuffer>, std::vector<RawLaunch>,
                           std::vector<size_t>>;  // like_h, inputs, buffers, launches, outputs
using RawKernel = std::tuple<std::string, uint64_t, uint64_t, std::vector<int>, int, int, int>;
using RawPlan = std::tuple<std::vector<RawKernel>, RawHalf, RawHalf>;

// A number that depends on the rows of h: ceil(rows * times / over) + plus.
struct Extent {
  explicit Extent(const RawExtent& raw);
  int64_t At(int64_t rows) const;  // throws c10::Error beyond 63 bits

  int64_t times, over, plus;
};

// One kernel of an artifact's cubins.
struct CubinKernel {
  explicit CubinKernel(const RawKernel& raw);

  std::string name;
  uint64_t offset, bytes;  // where in the cubins
  std::vector<int> sizes;  // of the arguments in bytes, 4 or 8
  int hidden;              // addresses that follow them, all null
  int threads;             // of a block
  int shared;              // bytes of dynamic shared memory
};

struct Argument {
  enum class Kind { kInput, kBuffer, kNumber };
  explicit Argument(const RawArgument& raw);

  Kind kind;
  size_t index;  // unused for kNumber
  Extent number;
};

struct Step {
  size_t kernel;
  std::vector<Extent> grid;  // three
  std::vector<Argument> arguments;
};

struct Allocation {
  explicit Allocation(const RawBuffer& raw);

  std::vector<int64_t> shape;
  bool rows;  // the leading extents of h come before `shape`
  at::ScalarType dtype;
};

struct HalfPlan {
  HalfPlan(const RawHalf& raw, const std::vector<CubinKernel>& kernels);

  size_t like_h, inputs;
  std::vector<Allocation> buffers;
  std::vector<Step> steps;
  std::vector<size_t> outputs;
};

// Invariant: every index in it is within what it counts, and every launch gives its kernel as
// many arguments as that takes.
struct LaunchPlan {
  explicit LaunchPlan(const RawPlan& raw);  // throws c10::ValueError where that does not hold

  std::vector<CubinKernel> kernels;
  HalfPlan forward, backward;
};

// One launch as it is handed to a device. Addresses and numbers are in `values`, each in the
// first `size` bytes of its 64 bits; hidden ones are among them.
struct LaunchCall {
  size_t kernel;
  std::array<uint32_t, 3> grid;  // none is 0
  std::vector<uint64_t> values;
};

// Puts launches on a device. Thread-safe.
class Launcher {
 public:
  virtual ~Launcher() = default;
  // On the current stream of the current device; what is launched there earlier is done first.
  virtual void Launch(const CubinKernel& kernel, const LaunchCall& call) = 0;
};

// The kernels of `cubins`, loaded on the current CUDA device. Throws c10::Error where there is
// none, where this extension is built without CUDA, or where the driver refuses one of them.
std::shared_ptr<Launcher> LoadCubins(const LaunchPlan& plan, std::string_view cubins);

// Runs one half of a plan: allocates its buffers where the inputs are, launches, and returns the
// outputs. An input whose address is not a multiple of 16 bytes is copied, for kernels are
// compiled for such.
//
// Thread-safe as its launcher is; nothing is kept between calls.
class PlannedHalf : public Half {
 public:
  PlannedHalf(std::shared_ptr<const LaunchPlan> plan, const HalfPlan& half,
              std::shared_ptr<Launcher> launcher);
  std::vector<at::Tensor> Run(std::vector<at::Tensor> inputs) override;

 private:
  const std::shared_ptr<const LaunchPlan> plan_;
  const HalfPlan& half_;  // of *plan_
  const std::shared_ptr<Launcher> launcher_;
};

// A kernel of both halves of `plan`; the other arguments are SeedKernel's.
c10::intrusive_ptr<SeedKernel> OpenPlan(
    const std::shared_ptr<const LaunchPlan>& plan, const std::shared_ptr<Launcher>& launcher,
    const std::vector<std::string>& backward_inputs, std::vector<int64_t> gradients,
    const std::string& device, const std::string& dtype,
    std::vector<std::vector<int64_t>> shapes);

}  // namespace esper
