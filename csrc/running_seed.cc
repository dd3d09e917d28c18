#include "running_seed.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <utility>

#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/variable.h>

#include "fork.h"
#include "plain.h"

namespace esper {
namespace {

constexpr int kModeShift = 62;
constexpr uint64_t kAlphaBits = (uint64_t{1} << kModeShift) - 1;
constexpr uint64_t kOff = uint64_t{3} << kModeShift;  // which is no mode

int64_t VersionOf(const at::Tensor& tensor) {
  return !tensor.defined() || tensor.is_inference() ? 0 : tensor._version();
}

bool RequiresGrad(const at::Tensor& tensor) { return tensor.requires_grad(); }

// Whether this backward is to leave gradients in leaves: backward() is, and torch.autograd.grad,
// or backward with inputs=, asks for some tensors' gradients and must change nothing else.
bool AccumulatesHere() {
  const auto* const only = torch::autograd::get_current_graph_task_exec_info();
  return only == nullptr || only->empty();
}

// By way of the parameter's own accumulation node: it takes the gradient over where it may, keeps
// to the parameter's layout, locks, and calls the hooks that wait for a gradient.
void Accumulate(const at::Tensor& param, at::Tensor gradient) {
  const auto accumulator = torch::autograd::impl::grad_accumulator(param);
  torch::autograd::variable_list gradients;
  gradients.push_back(std::move(gradient));
  (*accumulator)(std::move(gradients));
}

}  // namespace

Kept::Kept(Tensors tensors) : tensors_(std::move(tensors)) {
  versions_.reserve(tensors_.size());
  for (const auto& tensor : tensors_) versions_.push_back(VersionOf(tensor));
}

const Tensors& Kept::Get() const {
  for (size_t i = 0; i < tensors_.size(); ++i) {
    TORCH_CHECK(VersionOf(tensors_[i]) == versions_[i],
                "a tensor that the seed's backward needs has been modified by an inplace operation "
                "since its forward; a parameter changed between the two, say. Step the optimizer "
                "after the backward");
  }
  return tensors_;
}

RunningSeed::RunningSeed(c10::intrusive_ptr<SeedKernel> kernel, Tensors params)
    : kernel(std::move(kernel)), params(std::move(params)), how_(kOff) {
  for (const auto& param : this->params) {
    TORCH_CHECK_VALUE(param.is_leaf(),
                      "a seed's parameter is the result of an operation; pass the parameters "
                      "themselves, whose .grad the seed adds to");
  }
}

void RunningSeed::Set(double alpha, Mode mode) {
  TORCH_CHECK_VALUE(alpha >= 0.0 && alpha <= 1.0, "alpha is ", alpha,
                    "; it must be within 0 and 1");
  how_ = std::bit_cast<uint64_t>(std::abs(alpha)) | static_cast<uint64_t>(mode) << kModeShift;
}

void RunningSeed::Off() { how_ = kOff; }

RunningSeed::How RunningSeed::how() const {
  const uint64_t how = how_;
  if (how == kOff || failed_) return {false, 0.0, Mode::kFull};
  return {true, std::bit_cast<double>(how & kAlphaBits), static_cast<Mode>(how >> kModeShift)};
}

void RunningSeed::Fail(const std::string& why) {
  const ForkSafe lock(mutex_);
  if (failure_.empty()) failure_ = why.empty() ? "unknown" : why;
  failed_ = true;
}

std::string RunningSeed::failure() const {
  if (!failed_) return {};
  const ForkSafe lock(mutex_);
  return failure_;
}

void RunningSeed::MeasureDrift(const at::Tensor& h, const at::Tensor& out) {
  if (!wants_drift_) return;
  at::AutoDispatchBelowADInplaceOrView below;
  at::AutoGradMode no_grad(false);
  at::Tensor drift = at::linalg_vector_norm(out - h) / at::linalg_vector_norm(h);
  at::Tensor before;
  {
    const ForkSafe lock(mutex_);
    before = drift_;
  }
  if (before.defined()) drift = at::maximum(before, drift);  // not with the lock held: it allocates
  const ForkSafe lock(mutex_);
  std::swap(drift_, drift);  // the one before goes after the lock
}

at::Tensor RunningSeed::TakeDrift() {
  wants_drift_ = false;
  const ForkSafe lock(mutex_);
  return std::exchange(drift_, at::Tensor());
}

at::Tensor RunningSeed::Call(const at::Tensor& h) {
  const How how = this->how();
  if (!how.on) return h;
  const bool grad = at::GradMode::is_enabled();
  if (how.mode == Mode::kTraining && !grad) return h;
  try {
    if (how.mode == Mode::kTraining && h.requires_grad()) {
      if (std::any_of(params.begin(), params.end(), RequiresGrad)) Learn(h);
      return h;
    }
    at::Tensor out = kernel->Run(h, params, how.alpha, how.mode, shared_from_this());
    if (how.mode != Mode::kTraining) MeasureDrift(h, out);
    return out;
  } catch (const CallerError&) {
    throw;
  } catch (const python_error&) {
    throw;
  } catch (const std::exception& e) {
    Fail(e.what());  // whatever a kernel does, the host's own output stands
    return h;
  }
}

at::Tensor RunningSeed::CopyOf(const at::Tensor& h) {
  const auto options = h.options().dtype(kernel->dtype()).memory_format(at::MemoryFormat::Contiguous);
  if (!h.is_cpu()) return at::empty(h.sizes(), options).copy_(h);  // torch's allocator keeps it
  at::Tensor copy;
  {
    const ForkSafe lock(mutex_);
    copy = std::move(copy_);
  }
  // Nobody else may still read it: this is the only reference to the tensor, and the tensor's the
  // only one to its memory.
  const bool free = copy.defined() && copy.use_count() == 1 && copy.storage().use_count() == 1 &&
                    copy.sizes() == h.sizes();
  if (!free) copy = at::empty(h.sizes(), options);
  copy.copy_(h);
  at::Tensor kept = copy;
  const ForkSafe lock(mutex_);
  std::swap(copy_, kept);  // the one before goes after the lock
  return copy;
}

void RunningSeed::Learn(const at::Tensor& h) {
  CheckUntransformed(h, params);  // before anything is made that would be a part of a transform
  struct Lesson {
    std::shared_ptr<RunningSeed> seed;
    Kept saved;
    bool over = false;
  };
  auto lesson = std::make_shared<Lesson>();
  lesson->seed = shared_from_this();
  {
    at::AutoDispatchBelowADInplaceOrView below;
    at::AutoGradMode no_grad(false);
    const at::Tensor copy = CopyOf(h);
    kernel->CheckInputs(copy, params, 1.0, Mode::kTraining);
    lesson->saved = Kept(RunSeedForward(*kernel, copy, params, 1.0, true).saved);
  }
  h.register_hook([lesson](const at::Tensor& grad) {
    CheckFirstDerivative();
    if (!AccumulatesHere()) return;
    try {
      TORCH_CHECK(!lesson->over,
                  "the graph was gone through a second time, after the seed had let go of what its "
                  "backward needs. Pass retain_graph=True to the first backward");
      lesson->seed->Backward(lesson->saved.Get(), grad, 1.0, Mode::kTraining);
    } catch (const python_error&) {
      throw;
    } catch (const std::exception& e) {
      lesson->seed->Fail(std::string("backward: ") + e.what());
    }
    // As autograd's own nodes do: the graph may live on for long after its backward.
    if (!torch::autograd::get_current_graph_task_keep_graph()) {
      lesson->saved = Kept();
      lesson->over = true;
    }
  });
}

at::Tensor RunningSeed::Backward(const Tensors& saved, const at::Tensor& grad, double alpha, Mode mode) {
  at::AutoGradMode no_grad(false);
  std::vector<bool> needs(params.size() + 1, true);
  const bool accumulates = AccumulatesHere();
  for (size_t i = 1; i < needs.size(); ++i) {
    needs[i] = accumulates && params[i - 1].requires_grad();
  }
  Tensors found =
      RunSeedBackward(*kernel, saved, grad.to(kernel->dtype()), alpha, mode, needs);
  for (size_t i = 1; i < needs.size(); ++i) {
    if (found[i].defined()) Accumulate(params[i - 1], std::move(found[i]));
  }
  return found[0].defined() ? found[0].to(grad.scalar_type()) : at::zeros_like(grad);
}

}  // namespace esper
