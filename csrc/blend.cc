#include "blend.h"

#include <memory>
#include <string>
#include <utility>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/lerp.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>

#include "blend_kernels.h"

namespace esper {
namespace {

namespace ag = torch::autograd;

bool HasFastPath(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
    case at::kDouble:
    case at::kBFloat16:
    case at::kHalf:
      break;
    default:
      return false;
  }
#ifdef ESPER_WITH_CUDA
  const bool device = tensor.is_cpu() || tensor.is_cuda();
#else
  const bool device = tensor.is_cpu();
#endif
  return device && tensor.layout() == at::kStrided && tensor.is_contiguous();
}

void Forward(const at::Tensor& out, const at::Tensor& h, const at::Tensor& s, double alpha) {
#ifdef ESPER_WITH_CUDA
  if (h.is_cuda()) return BlendForwardCuda(out, h, s, alpha);
#endif
  BlendForwardCpu(out, h, s, alpha);
}

void Backward(const Grads& out, const at::Tensor& grad, double alpha) {
#ifdef ESPER_WITH_CUDA
  if (grad.is_cuda()) return BlendBackwardCuda(out, grad, alpha);
#endif
  BlendBackwardCpu(out, grad, alpha);
}

// Nobody else can see this tensor's memory, so it may be written to.
bool IsOurs(const at::Tensor& tensor) {
  return tensor.use_count() == 1 && tensor.storage().use_count() == 1;
}

// Nothing is saved: the gradients are multiples of the one that comes in.
struct BlendNode : ag::Node {
  std::string name() const override { return "EsperBlendBackward"; }

  ag::variable_list apply(ag::variable_list&& grads) override {
    at::Tensor grad = std::move(grads[0]);
    const bool needs_h = task_should_compute_output(0);
    const bool needs_s = task_should_compute_output(1);
    ag::variable_list result(2);
    if (!grad.defined()) return result;
    // The blend is linear, so torch's own product is right for every derivative of it; the fused
    // pass is for the plain case in which both gradients are wanted once.
    if (needs_h && needs_s && !at::GradMode::is_enabled() && HasFastPath(grad)) {
      at::AutoDispatchBelowADInplaceOrView below;
      const bool ours = IsOurs(grad);
      const Grads both{at::empty_like(grad), ours ? grad : at::empty_like(grad)};
      Backward(both, grad, alpha);
      return {both.h, both.s};
    }
    if (needs_h) result[0] = at::mul(grad, 1.0 - alpha);
    if (needs_s) result[1] = at::mul(grad, alpha);
    return result;
  }

  double alpha = 0;
};

}  // namespace

at::Tensor Blend(const at::Tensor& h, const at::Tensor& s, double alpha, bool reuse) {
  TORCH_CHECK_VALUE(alpha >= 0.0 && alpha <= 1.0, "alpha is ", alpha,
                    "; it must be within 0 and 1");
  TORCH_CHECK_VALUE(h.sizes() == s.sizes() && h.scalar_type() == s.scalar_type() &&
                        h.device() == s.device(),
                    "blend was given h of ", h.sizes(), " ", h.scalar_type(), " on ",
                    h.device(), " and s of ", s.sizes(), " ", s.scalar_type(), " on ",
                    s.device(), "; both must have the same shape, type and device");
  TORCH_CHECK_VALUE(h.is_floating_point(), "blend was given ", h.scalar_type(),
                    "; it needs a floating point type");
  if (alpha == 0.0) return h;
  if (alpha == 1.0) return s;
  if (!HasFastPath(h) || !HasFastPath(s)) return at::lerp(h, s, alpha);

  const bool grad = at::GradMode::is_enabled() && (h.requires_grad() || s.requires_grad());
  // A view's base has a history of its own, and a leaf is somebody's parameter.
  const bool into_s = reuse && !s.is_view() && !(s.requires_grad() && s.is_leaf()) &&
                      !s.is_inference() && !s.is_alias_of(h);
  c10::intrusive_ptr<BlendNode> node;
  if (grad) {
    node = c10::make_intrusive<BlendNode>();
    node->alpha = alpha;
    node->set_next_edges({ag::impl::gradient_edge(h), ag::impl::gradient_edge(s)});
  }
  at::Tensor out;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    out = into_s ? s : at::empty_like(h);
    Forward(out, h, s, alpha);
  }
  if (into_s) {
    ag::impl::bump_version(out);
    if (grad) ag::impl::rebase_history(out, {node, 0});
  } else if (grad) {
    ag::set_history(out, node);
  }
  return out;
}

}  // namespace esper
