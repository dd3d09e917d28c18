#include "launch_plan.h"

#include <limits>
#include <utility>

#include <ATen/ops/empty.h>

namespace esper {
namespace {

constexpr uintptr_t kAlignment = 16;  // esper/leyline/launch.py: ALIGNMENT
constexpr std::array<int64_t, 3> kMaxGrid{std::numeric_limits<int32_t>::max(), 65535, 65535};

at::ScalarType ParseType(const std::string& text) {
  if (text == "fp32") return at::kFloat;
  if (text == "bf16") return at::kBFloat16;
  TORCH_CHECK_VALUE(text == "fp16", "a buffer is of ", text, "; it must be fp32, bf16 or fp16");
  return at::kHalf;
}

Argument::Kind ParseKind(const std::string& text) {
  if (text == "in") return Argument::Kind::kInput;
  if (text == "buf") return Argument::Kind::kBuffer;
  TORCH_CHECK_VALUE(text == "number", "an argument is ", text, "; it must be in, buf or number");
  return Argument::Kind::kNumber;
}

at::Tensor Aligned(at::Tensor tensor) {
  const bool fits = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kAlignment == 0;
  return fits ? std::move(tensor) : tensor.clone();
}

}  // namespace

Extent::Extent(const RawExtent& raw)
    : times(std::get<0>(raw)), over(std::get<1>(raw)), plus(std::get<2>(raw)) {
  TORCH_CHECK_VALUE(times >= 0 && over >= 1 && plus >= 0, "an extent of ", times, " / ", over,
                    " rows + ", plus, "; none of these is negative, and ", over, " is not zero");
}

int64_t Extent::At(int64_t rows) const {
  int64_t value = 0;
  const bool beyond = __builtin_mul_overflow(rows, times, &value) ||
                      __builtin_add_overflow(value, over - 1, &value) ||
                      __builtin_add_overflow(value / over, plus, &value);
  TORCH_CHECK(!beyond, rows, " rows are more than a kernel's numbers can count");
  return value;
}

CubinKernel::CubinKernel(const RawKernel& raw)
    : name(std::get<0>(raw)),
      offset(std::get<1>(raw)),
      bytes(std::get<2>(raw)),
      sizes(std::get<3>(raw)),
      hidden(std::get<4>(raw)),
      threads(std::get<5>(raw)),
      shared(std::get<6>(raw)) {
  for (const int size : sizes) {
    TORCH_CHECK_VALUE(size == 4 || size == 8, "kernel ", name, " takes an argument of ", size,
                      " bytes; it must be 4 or 8");
  }
  TORCH_CHECK_VALUE(hidden >= 0 && threads > 0 && shared >= 0, "kernel ", name, " has ", hidden,
                    " hidden arguments, ", threads, " threads and ", shared, " bytes");
}

Argument::Argument(const RawArgument& raw)
    : kind(ParseKind(std::get<0>(raw))), index(std::get<1>(raw)), number(std::get<2>(raw)) {}

Allocation::Allocation(const RawBuffer& raw)
    : shape(std::get<0>(raw)), rows(std::get<1>(raw)), dtype(ParseType(std::get<2>(raw))) {}

HalfPlan::HalfPlan(const RawHalf& raw, const std::vector<CubinKernel>& kernels)
    : like_h(std::get<0>(raw)), inputs(std::get<1>(raw)), outputs(std::get<4>(raw)) {
  for (const auto& buffer : std::get<2>(raw)) buffers.emplace_back(buffer);
  for (const auto& [kernel, grid, arguments] : std::get<3>(raw)) {
    TORCH_CHECK_VALUE(kernel < kernels.size(), "there is no kernel ", kernel);
    TORCH_CHECK_VALUE(arguments.size() == kernels[kernel].sizes.size(), kernels[kernel].name,
                      " takes ", kernels[kernel].sizes.size(), " arguments, ", arguments.size(),
                      " are planned");
    Step step{kernel, {}, {}};
    for (const auto& extent : grid) step.grid.emplace_back(extent);
    for (size_t i = 0; i < arguments.size(); ++i) {
      const Argument argument(arguments[i]);
      const bool number = argument.kind == Argument::Kind::kNumber;
      const size_t count =
          argument.kind == Argument::Kind::kInput ? inputs : buffers.size();
      TORCH_CHECK_VALUE(number || (argument.index < count && kernels[kernel].sizes[i] == 8),
                        "argument ", i, " of ", kernels[kernel].name, " is tensor ",
                        argument.index, " of ", count, "; or it is not passed as an address");
      step.arguments.push_back(argument);
    }
    steps.push_back(std::move(step));
  }
  TORCH_CHECK_VALUE(like_h < inputs, "input ", like_h, " of ", inputs, " is to be like h");
  for (const size_t output : outputs) {
    TORCH_CHECK_VALUE(output < buffers.size(), "output ", output, " of ", buffers.size(),
                      " buffers is to be returned");
  }
}

LaunchPlan::LaunchPlan(const RawPlan& raw)
    : kernels(std::get<0>(raw).begin(), std::get<0>(raw).end()),
      forward(std::get<1>(raw), kernels),
      backward(std::get<2>(raw), kernels) {}

PlannedHalf::PlannedHalf(std::shared_ptr<const LaunchPlan> plan, const HalfPlan& half,
                         std::shared_ptr<Launcher> launcher)
    : plan_(std::move(plan)), half_(half), launcher_(std::move(launcher)) {}

std::vector<at::Tensor> PlannedHalf::Run(std::vector<at::Tensor> inputs) {
  TORCH_CHECK(inputs.size() == half_.inputs, "a half of a plan was given ", inputs.size(),
              " tensors, it takes ", half_.inputs);
  for (auto& input : inputs) {
    TORCH_CHECK(input.is_contiguous(), "a half of a plan was given a tensor with gaps");
    input = Aligned(std::move(input));
  }
  const at::Tensor& h = inputs[half_.like_h];
  const auto lead = h.sizes().slice(0, h.dim() - 1);
  int64_t rows = 1;
  for (const int64_t extent : lead) rows *= extent;

  std::vector<at::Tensor> buffers;
  buffers.reserve(half_.buffers.size());
  for (const auto& buffer : half_.buffers) {
    std::vector<int64_t> shape;
    if (buffer.rows) shape.assign(lead.begin(), lead.end());
    shape.insert(shape.end(), buffer.shape.begin(), buffer.shape.end());
    buffers.push_back(at::empty(shape, h.options().dtype(buffer.dtype)));
  }
  for (const auto& step : half_.steps) {
    const CubinKernel& kernel = plan_->kernels[step.kernel];
    LaunchCall call{step.kernel, {}, {}};
    bool empty = false;
    for (size_t i = 0; i < call.grid.size(); ++i) {
      const int64_t blocks = step.grid[i].At(rows);
      TORCH_CHECK(blocks <= kMaxGrid[i], kernel.name, " needs ", blocks, " blocks for ", rows,
                  " rows, a grid has at most ", kMaxGrid[i], "; use a smaller batch");
      call.grid[i] = static_cast<uint32_t>(blocks);
      empty |= blocks == 0;
    }
    if (empty) continue;
    call.values.reserve(step.arguments.size() + kernel.hidden);
    for (size_t i = 0; i < step.arguments.size(); ++i) {
      const Argument& argument = step.arguments[i];
      if (argument.kind == Argument::Kind::kNumber) {
        const int64_t number = argument.number.At(rows);
        TORCH_CHECK(kernel.sizes[i] == 8 || number <= std::numeric_limits<int32_t>::max(),
                    kernel.name, " is given ", number,
                    " where it takes 32 bits; use a smaller batch");
        call.values.push_back(static_cast<uint64_t>(number));
      } else {
        const bool input = argument.kind == Argument::Kind::kInput;
        const at::Tensor& tensor = input ? inputs[argument.index] : buffers[argument.index];
        call.values.push_back(reinterpret_cast<uintptr_t>(tensor.data_ptr()));
      }
    }
    call.values.insert(call.values.end(), kernel.hidden, 0);
    launcher_->Launch(kernel, call);
  }
  std::vector<at::Tensor> outputs;
  outputs.reserve(half_.outputs.size());
  for (const size_t output : half_.outputs) outputs.push_back(buffers[output]);
  return outputs;
}

c10::intrusive_ptr<SeedKernel> OpenPlan(
    const std::shared_ptr<const LaunchPlan>& plan, const std::shared_ptr<Launcher>& launcher,
    const std::vector<std::string>& backward_inputs, std::vector<int64_t> gradients,
    const std::string& device, const std::string& dtype,
    std::vector<std::vector<int64_t>> shapes) {
  return c10::make_intrusive<SeedKernel>(
      std::make_unique<PlannedHalf>(plan, plan->forward, launcher),
      std::make_unique<PlannedHalf>(plan, plan->backward, launcher), backward_inputs,
      std::move(gradients), device, dtype, std::move(shapes));
}

#ifndef ESPER_WITH_CUDA
std::shared_ptr<Launcher> LoadCubins(const LaunchPlan&, std::string_view) {
  TORCH_CHECK(false, "a kernel is made of cubins, and this extension is built without CUDA; "
                     "install esper where nvcc and a CUDA build of torch are");
}
#endif

}  // namespace esper
