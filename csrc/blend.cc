#include "blend.h"

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/lerp.h>
#include <ATen/ops/mul.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>

#include "blend_kernels.h"
#include "plain.h"

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
  return device && tensor.layout() == at::kStrided && IsPlain(tensor) &&
         tensor.is_non_overlapping_and_dense();
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

// Of two dense tensors of one shape. (Strides of axes of extent 1 say nothing.)
bool InOneOrder(const at::Tensor& a, const at::Tensor& b) {
  return a.strides() == b.strides() || (a.is_contiguous() && b.is_contiguous());
}

// Memory of the same layout whose pages are not there yet. At these sizes malloc returns fresh
// memory every time, and faulting it in by pages of 4 KiB takes several times as long as blending
// it: 64 MiB are 16384 faults, or 32 huge pages.
at::Tensor Allocate(const at::Tensor& like) {
  at::Tensor out = at::empty_like(like);
#ifdef MADV_HUGEPAGE
  constexpr std::uintptr_t kHugePage = std::uintptr_t{2} << 20;
  if (out.is_cpu() && out.nbytes() >= 2 * kHugePage) {
    // Whole pages inside the tensor only, so nothing is made resident that is not written.
    const auto begin = reinterpret_cast<std::uintptr_t>(out.mutable_data_ptr());
    const std::uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1);
    const std::uintptr_t end = (begin + out.nbytes()) & ~(kHugePage - 1);
    // Advice: where it is refused, the pages stay small.
    (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
  }
#endif
  return out;
}

// No other tensor sees this tensor's memory, saved ones included.
bool OwnsItsMemory(const at::Tensor& tensor) { return tensor.storage().use_count() == 1; }

// See the header.
bool MayWriteInto(const at::Tensor& s, const at::Tensor& h) {
  const bool recorded = s.requires_grad() && (s.is_leaf() || !at::GradMode::is_enabled());
  const bool frozen = s.is_inference() && !c10::InferenceMode::is_enabled();
  return !recorded && !frozen && !s.is_same(h) && OwnsItsMemory(s);
}

// Nothing is saved: the gradients are multiples of the one that comes in.
//
// Invariant: alpha is fixed before the graph is seen by anyone, so any thread may call apply.
struct BlendNode : ag::Node {
  std::string name() const override { return "EsperBlendBackward"; }

  ag::variable_list apply(ag::variable_list&& grads) override {
    at::Tensor grad = std::move(grads[0]);
    const bool needs_h = task_should_compute_output(0);
    const bool needs_s = task_should_compute_output(1);
    ag::variable_list result(2);
    if (!grad.defined() || !(needs_h || needs_s)) return result;
    // The blend is linear, so torch's own product is right for every derivative of it; the rest
    // is for the plain case in which nobody will differentiate the gradients.
    if (!at::GradMode::is_enabled() && HasFastPath(grad)) {
      at::AutoDispatchBelowADInplaceOrView below;
      // The engine has moved the gradient here and nobody else holds it.
      const bool ours = grad.use_count() == 1 && OwnsItsMemory(grad);
      if (needs_h && needs_s) {
        const Grads both{Allocate(grad), ours ? grad : Allocate(grad)};
        Backward(both, grad, alpha);
        return {both.h, both.s};
      }
      if (ours) {
        grad.mul_(needs_h ? 1.0 - alpha : alpha);
        result[needs_h ? 0 : 1] = std::move(grad);
        return result;
      }
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
  if (!HasFastPath(h) || !HasFastPath(s) || !InOneOrder(h, s)) return at::lerp(h, s, alpha);

  const bool grad = at::GradMode::is_enabled() && (h.requires_grad() || s.requires_grad());
  const bool into_s = reuse && MayWriteInto(s, h);
  c10::intrusive_ptr<BlendNode> node;
  if (grad) {
    node = c10::make_intrusive<BlendNode>();
    node->alpha = alpha;
    node->set_next_edges({ag::impl::gradient_edge(h), ag::impl::gradient_edge(s)});
  }
  at::Tensor out;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    out = into_s ? s : Allocate(h);
    Forward(out, h, s, alpha);
  }
  if (into_s) {
    ag::impl::bump_version(out);
    if (grad) {
      const uint32_t output = node->add_input_metadata(out);
      ag::impl::rebase_history(out, {node, output});
    }
  } else if (grad) {
    ag::set_history(out, node);
  }
  return out;
}

}  // namespace esper
