#include "plain.h"

#include <algorithm>
#include <array>
#include <cstdlib>

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>

namespace esper {
namespace {

using Key = c10::DispatchKey;
using Keys = c10::DispatchKeySet;

constexpr Keys kTransformed{Key::Python, Key::Functionalize, Key::FuncTorchBatched, Key::Batched,
                            Key::FuncTorchGradWrapper};
constexpr Keys kLazy{Key::Negative, Key::ZeroTensor};
// Included on a thread for as long as a transform of torch.func or torch.jit.trace is at work on
// it. Whatever tensor is made then is a part of that.
constexpr Keys kTransforming{Key::FuncTorchDynamicLayerFrontMode, Key::Tracer};

bool TracingMode() {
  if (!c10::impl::dispatch_mode_enabled()) return false;
  using Mode = c10::impl::TorchDispatchModeKey;
  return std::ranges::any_of(std::array{Mode::FAKE, Mode::PROXY, Mode::FUNCTIONAL}, [](Mode mode) {
    return c10::impl::TorchDispatchModeTLS::get_mode(mode).has_value();
  });
}

bool HasForwardGrad(const at::Tensor& tensor) { return torch::autograd::isFwGradDefined(tensor); }

}  // namespace

bool IsPlain(const at::Tensor& tensor) {
  return !tensor.key_set().has_any(kTransformed | kLazy) &&
         !c10::impl::dispatch_mode_enabled() && !HasForwardGrad(tensor);
}

bool IsWrapped(const at::Tensor& tensor) {
  return tensor.key_set().has_any(Keys{Key::FuncTorchBatched, Key::FuncTorchGradWrapper});
}

void RefuseTransformed() {
  CheckCall(false,
            "a compiled kernel was called under a transform (torch.func, forward-mode derivatives, "
            "torch.jit.trace, make_fx) or with a tensor that is fake or of a subclass; its code "
            "would compute past that. Call it outside of the transform, or transform what "
            "esper.export(model) returns");
  std::abort();  // not reached
}

void CheckUntransformed(const at::Tensor& h, const std::vector<at::Tensor>& params) {
  Keys keys = h.key_set();
  for (const auto& param : params) keys = keys | param.key_set();
  bool transformed = keys.has_any(kTransformed) ||
                     c10::impl::tls_local_dispatch_key_set().included_.has_any(kTransforming) ||
                     TracingMode();
  // To ask each tensor takes a lock of its own; that any has one is rare.
  if (!transformed && torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr) {
    transformed = HasForwardGrad(h) || std::any_of(params.begin(), params.end(), HasForwardGrad);
  }
  if (transformed) RefuseTransformed();
}

at::Tensor Materialized(const at::Tensor& tensor) {
  if (tensor.key_set().has_any(kLazy)) return tensor.clone(at::MemoryFormat::Contiguous);
  return tensor.contiguous();
}

}  // namespace esper
