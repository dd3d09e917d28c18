#include "seed_kernel.h"

#include <algorithm>
#include <charconv>
#include <optional>
#include <utility>

#include <ATen/autocast_mode.h>
#include <ATen/ops/full.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/inductor/aoti_runner/model_container_runner_cpu.h>
#ifdef ESPER_WITH_CUDA
#include <torch/csrc/inductor/aoti_runner/model_container_runner_cuda.h>
#endif

#include "fork.h"
#include "plain.h"
#include "seed_node.h"

namespace esper {
namespace {

constexpr const char* kConvention =
    "an input of the backward is \"in:I\" (forward input), \"out:K\" (forward output) or "
    "\"grad\"; compile the kernel again with the compiler of this version";

using Runner = torch::inductor::AOTIModelContainerRunner;

std::unique_ptr<Runner> Open(const std::string& path, const at::Device& device) {
  if (device.is_cpu()) {
    return std::make_unique<torch::inductor::AOTIModelContainerRunnerCpu>(path);
  }
#ifdef ESPER_WITH_CUDA
  if (device.is_cuda()) {
    const auto slash = path.find_last_of('/');
    const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash);
    return std::make_unique<torch::inductor::AOTIModelContainerRunnerCuda>(
        path, 1, device.str(), folder);
  }
#endif
  TORCH_CHECK_VALUE(false, "a kernel was asked for on device ", device,
                    ", but this extension runs kernels on cpu",
#ifdef ESPER_WITH_CUDA
                    " and cuda; choose one of them");
#else
                    " only; install esper where nvcc and a CUDA build of torch are");
#endif
}

// "cuda" is the current device, as everywhere in torch.
at::Device WithIndex(at::Device device) {
#ifdef ESPER_WITH_CUDA
  if (device.is_cuda() && !device.has_index()) {
    return c10::impl::VirtualGuardImpl(device.type()).getDevice();
  }
#endif
  return device;
}

// A shared library that Inductor compiled.
class CompiledHalf : public Half {
 public:
  CompiledHalf(const std::string& path, const at::Device& device) : on_cpu_(device.is_cpu()) {
    const NoFork no_fork;
    runner_ = Open(path, device);
  }
  ~CompiledHalf() override {
    const NoFork no_fork;
    runner_.reset();
  }
  // AOTInductor's runner allocates the results itself and has no way to be given any.
  std::vector<at::Tensor> Run(std::vector<at::Tensor> inputs) override {
    // On a GPU nothing is held: a forked child cannot use it anyway, and torch's allocator may have
    // to wait for Python's lock, where a history of it is kept.
    std::optional<NoFork> no_fork;
    if (on_cpu_) no_fork.emplace();
    return runner_->boxed_run(std::move(inputs));
  }

 private:
  const bool on_cpu_;
  std::unique_ptr<Runner> runner_;
};

at::ScalarType ParseDtype(const std::string& text) {
  if (text == "float32") return at::kFloat;
  if (text == "float64") return at::kDouble;
  if (text == "bfloat16") return at::kBFloat16;
  if (text == "float16") return at::kHalf;
  TORCH_CHECK_VALUE(false, "dtype is ", text,
                    "; it must be float32, float64, bfloat16 or float16");
}

// Compiled code does not check what it reads: other sizes would be read beyond their end.
bool Fits(at::IntArrayRef sizes, const std::vector<int64_t>& shape) {
  return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end(),
                    [](int64_t size, int64_t wanted) { return wanted < 0 || size == wanted; });
}

// Where a mode in Python learns of an operator that is called.
constexpr c10::DispatchKeySet kPython{c10::DispatchKey::Python,
                                      c10::DispatchKey::PythonTLSSnapshot};

// Compiled code calls back into torch's operators. An autocast that surrounds the training step
// must not reach those: it would change the types that the code was compiled for. Nor must a mode
// in Python, whose lock nobody may wait for here, see NoFork.
std::vector<at::Tensor> RunHalf(Half& code, const at::Device& device,
                                std::vector<at::Tensor> inputs, size_t wanted, const char* half) {
  c10::impl::ExcludeDispatchKeyGuard nobody(c10::autocast_dispatch_keyset | kPython);
  at::OptionalDeviceGuard on_device;
  if (!device.is_cpu()) on_device.reset_device(device);
  auto outputs = code.Run(std::move(inputs));
  TORCH_CHECK(outputs.size() >= wanted, "the kernel's ", half, " returned ", outputs.size(),
              " tensors, its manifest needs at least ", wanted,
              "; manifest and code do not belong together: compile the kernel again");
  return outputs;
}

}  // namespace

Source Source::Parse(const std::string& text, size_t forward_inputs) {
  if (text == "grad") return {Kind::kGradOutput, 0};
  const bool is_input = text.rfind("in:", 0) == 0;
  const bool is_output = text.rfind("out:", 0) == 0;
  TORCH_CHECK_VALUE(is_input || is_output, "cannot read ", text, ": ", kConvention);
  size_t index = 0;
  const char* const first = text.data() + (is_input ? 3 : 4);
  const char* const last = text.data() + text.size();
  const auto [end, error] = std::from_chars(first, last, index);
  TORCH_CHECK_VALUE(error == std::errc() && end == last && first != last, "cannot read ", text,
                    ": ", kConvention);
  if (!is_input) return {Kind::kForwardOutput, index};
  TORCH_CHECK_VALUE(index < forward_inputs, "the backward asks for ", text,
                    ", the forward has ", forward_inputs, " inputs; ", kConvention);
  return {Kind::kForwardInput, index};
}

at::Tensor AlphaCache::Get(double alpha, at::Device device) {
  std::optional<c10::Stream> stream;
  if (!device.is_cpu()) {
    stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
  }
  const bool captured = stream && stream->is_capturing();
  if (!captured && mutex_.TryLock()) {
    const Held& held = alpha == 1.0 ? one_ : current_;
    const bool fits = held.tensor.defined() && held.value == alpha &&
                      held.tensor.device() == device && held.stream == stream;
    at::Tensor found = fits ? held.tensor : at::Tensor();
    mutex_.Unlock();
    if (fits) return found;
  }
  // Made under inference_mode it could never be saved for a backward, and it outlives the call.
  c10::InferenceMode off(false);
  c10::impl::ExcludeDispatchKeyGuard nobody(kPython);
  const at::Tensor tensor =
      at::full({}, alpha, at::TensorOptions().dtype(at::kFloat).device(device));
  Held made{tensor, stream, alpha};
  if (!captured && mutex_.TryLock()) {
    std::swap(alpha == 1.0 ? one_ : current_, made);
    mutex_.Unlock();  // and what was there before goes after that
  }
  return tensor;
}

SeedKernel::SeedKernel(
    const std::vector<std::string>& backward_inputs,
    std::vector<int64_t> gradients,
    const std::string& device,
    const std::string& dtype,
    std::vector<std::vector<int64_t>> shapes)
    : gradients_(std::move(gradients)),
      device_(WithIndex(at::Device(device))),
      dtype_(ParseDtype(dtype)),
      shapes_(std::move(shapes)) {
  TORCH_CHECK_VALUE(!gradients_.empty(),
                    "gradients is empty; it has one entry for h and one for each parameter");
  for (const auto index : gradients_) {
    TORCH_CHECK_VALUE(index >= -1, "gradients holds ", index,
                      "; an entry is an index of a backward output, or -1 for none");
    backward_outputs_ = std::max(backward_outputs_, static_cast<size_t>(index + 1));
  }
  TORCH_CHECK_VALUE(shapes_.empty() || shapes_.size() == gradients_.size(), "shapes has ",
                    shapes_.size(), " entries; it has one for h and one for each parameter, ",
                    gradients_.size(), " in all");
  const size_t forward_inputs = gradients_.size() + 1;  // h and the parameters, and alpha
  for (const auto& text : backward_inputs) {
    sources_.push_back(Source::Parse(text, forward_inputs));
    if (sources_.back().kind == Source::Kind::kForwardOutput) {
      forward_outputs_ = std::max(forward_outputs_, sources_.back().index + 1);
    }
  }
}

SeedKernel::SeedKernel(
    const std::string& forward_so,
    const std::string& backward_so,
    const std::vector<std::string>& backward_inputs,
    std::vector<int64_t> gradients,
    const std::string& device,
    const std::string& dtype,
    std::vector<std::vector<int64_t>> shapes)
    : SeedKernel(backward_inputs, std::move(gradients), device, dtype, std::move(shapes)) {
  forward_ = std::make_unique<CompiledHalf>(forward_so, device_);
  backward_ = std::make_unique<CompiledHalf>(backward_so, device_);
}

SeedKernel::SeedKernel(
    std::unique_ptr<Half> forward,
    std::unique_ptr<Half> backward,
    const std::vector<std::string>& backward_inputs,
    std::vector<int64_t> gradients,
    const std::string& device,
    const std::string& dtype,
    std::vector<std::vector<int64_t>> shapes)
    : SeedKernel(backward_inputs, std::move(gradients), device, dtype, std::move(shapes)) {
  forward_ = std::move(forward);
  backward_ = std::move(backward);
}

std::vector<at::Tensor> SeedKernel::RunForward(std::vector<at::Tensor> inputs) {
  return RunHalf(*forward_, device_, std::move(inputs), forward_outputs_, "forward");
}

std::vector<at::Tensor> SeedKernel::RunBackward(std::vector<at::Tensor> inputs) {
  return RunHalf(*backward_, device_, std::move(inputs), backward_outputs_, "backward");
}

void SeedKernel::CheckInputs(const at::Tensor& h, const std::vector<at::Tensor>& params,
                             double alpha, Mode mode) const {
  // Compiled code does not look at what it is given: a wrong device or element type would be
  // read as if it were right.
  TORCH_CHECK_VALUE(params.size() + 1 == gradients_.size(), "the kernel has ",
                    gradients_.size() - 1, " parameters, ", params.size(),
                    " were given; pass the parameters made from its manifest, in that order");
  CheckUntransformed(h, params);
  CheckCall(h.device() == device_, "the kernel runs on ", device_, ", h is on ", h.device(),
            "; move the model back, or let it grow there");
  for (const auto& param : params) {
    TORCH_CHECK_VALUE(param.device() == h.device() && param.scalar_type() == h.scalar_type(),
                      "h is ", h.scalar_type(), " on ", h.device(), ", a parameter is ",
                      param.scalar_type(), " on ", param.device(),
                      "; move the seed with its host, and call it outside of autocast");
  }
  // Agreement with the parameters is not enough: a model that is converted as a whole takes its
  // seeds' parameters along, and float32 code would then read beyond the end of a half h.
  TORCH_CHECK_VALUE(h.scalar_type() == dtype_, "the kernel is compiled for ", dtype_, ", h is ",
                    h.scalar_type(),
                    "; choose a kernel for that type, or convert the model before it grows");
  for (size_t i = 0; i < shapes_.size(); ++i) {
    const at::Tensor& given = i == 0 ? h : params[i - 1];
    TORCH_CHECK_VALUE(Fits(given.sizes(), shapes_[i]), i == 0 ? "h" : "a parameter", " is of ",
                      given.sizes(), ", the kernel is compiled for ", at::IntArrayRef(shapes_[i]),
                      " (-1: any); choose a kernel for that site");
  }
  TORCH_CHECK_VALUE(mode == Mode::kTraining || (alpha >= 0.0 && alpha <= 1.0), "alpha is ",
                    alpha, "; it must be within 0 and 1");
}

at::Tensor SeedKernel::Run(const at::Tensor& h, const std::vector<at::Tensor>& params,
                           double alpha, Mode mode, std::shared_ptr<FailureSink> sink) {
  if (h.scalar_type() != dtype_ && h.is_floating_point() &&
      at::autocast::is_autocast_enabled(h.device().type())) {
    // Under autocast a site's element type is whatever the layer before it was cast to.
    const at::Tensor in = h.to(dtype_);
    const at::Tensor out = Run(in, params, alpha, mode, std::move(sink));
    return out.is_same(in) ? h : out.to(h.scalar_type());
  }
  CheckInputs(h, params, alpha, mode);
  if (mode != Mode::kTraining && alpha == 0.0) return h;
  return ApplySeed(h, params, c10::intrusive_ptr<SeedKernel>::reclaim_copy(this), alpha, mode,
                   std::move(sink));
}

}  // namespace esper
