#include "blend.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/lerp.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/custom_function.h>

#include "blend_kernels.h"

namespace esper {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

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

at::Tensor Forward(const at::Tensor& h, const at::Tensor& s, double alpha) {
#ifdef ESPER_WITH_CUDA
  if (h.is_cuda()) return BlendForwardCuda(h, s, alpha);
#endif
  return BlendForwardCpu(h, s, alpha);
}

Grads Backward(const at::Tensor& grad, double alpha) {
#ifdef ESPER_WITH_CUDA
  if (grad.is_cuda()) return BlendBackwardCuda(grad, alpha);
#endif
  return BlendBackwardCpu(grad, alpha);
}

struct BlendNode : torch::autograd::Function<BlendNode> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& h, const at::Tensor& s,
                            double alpha) {
    ctx->saved_data["alpha"] = alpha;
    return Forward(h, s, alpha);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const double alpha = ctx->saved_data["alpha"].toDouble();
    const at::Tensor& grad = grads[0];
    const bool needs_h = ctx->needs_input_grad(0);
    const bool needs_s = ctx->needs_input_grad(1);
    // The blend is linear, so torch's own product is right for every derivative of it; the fused
    // pass is for the plain case in which both gradients are wanted once.
    if (needs_h && needs_s && !at::GradMode::is_enabled() && HasFastPath(grad)) {
      Grads both = Backward(grad, alpha);
      return {both.h, both.s, at::Tensor()};
    }
    return {needs_h ? at::mul(grad, 1.0 - alpha) : at::Tensor(),
            needs_s ? at::mul(grad, alpha) : at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor Blend(const at::Tensor& h, const at::Tensor& s, double alpha) {
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
  if (!at::GradMode::is_enabled() || !(h.requires_grad() || s.requires_grad())) {
    return Forward(h, s, alpha);
  }
  return BlendNode::apply(h, s, alpha);
}

}  // namespace esper
