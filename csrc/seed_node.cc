#include "seed_node.h"

#include <algorithm>
#include <utility>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

namespace esper {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What the backward must know of its forward, carried by the graph's node. Immutable.
struct Call : torch::CustomClassHolder {
  Call(c10::intrusive_ptr<SeedKernel> k, double a, Mode m)
      : kernel(std::move(k)), alpha(a), mode(m) {}

  const c10::intrusive_ptr<SeedKernel> kernel;
  const double alpha;
  const Mode mode;
};

variable_list ForwardInputs(SeedKernel& kernel, const at::Tensor& h, at::TensorList params,
                            double alpha, Mode mode) {
  variable_list inputs;
  inputs.reserve(params.size() + 2);
  // Kernels are compiled for contiguous inputs. In TRAINING the caller gets h itself back, and
  // what it does to it next (an in-place activation, say) must not reach what was saved here.
  inputs.push_back(mode == Mode::kTraining ? h.detach().clone(at::MemoryFormat::Contiguous)
                                           : h.contiguous());
  inputs.push_back(kernel.alphas().Get(mode == Mode::kTraining ? 1.0 : alpha, h.device()));
  for (const auto& param : params) inputs.push_back(param.contiguous());
  return inputs;
}

// Only what the backward reads is saved, through SavedVariable: that is what notices an in-place
// change between forward and backward, honours saved-tensor hooks, and frees early.
struct SeedNode : torch::autograd::Function<SeedNode> {
  // `params` is a TensorList and not a vector: autograd looks for variables in the former only.
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& h, at::TensorList params,
                            const c10::intrusive_ptr<Call>& call) {
    SeedKernel& kernel = *call->kernel;
    variable_list inputs = ForwardInputs(kernel, h, params, call->alpha, call->mode);
    variable_list outputs = kernel.RunForward(inputs);
    variable_list saved;
    saved.reserve(kernel.sources().size());
    for (const auto& source : kernel.sources()) {
      if (source.kind == Source::Kind::kForwardInput) saved.push_back(inputs[source.index]);
      if (source.kind == Source::Kind::kForwardOutput) saved.push_back(outputs[source.index]);
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["call"] = c10::IValue::make_capsule(call);
    // An input that is returned unchanged comes out as an alias with this node behind it.
    return call->mode == Mode::kTraining ? h : outputs[0];
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "a second derivative was asked for (create_graph=True) through a compiled seed; "
                "its backward is compiled too and has no derivative. Leave create_graph off, or "
                "cull the seed first");
    const auto call =
        c10::static_intrusive_pointer_cast<Call>(ctx->saved_data["call"].toCapsule());
    SeedKernel& kernel = *call->kernel;
    const auto& picks = kernel.gradients();
    // One more than there are tensors: the last argument of forward, which has no gradient.
    variable_list result(picks.size() + 1);

    const bool needs_h = ctx->needs_input_grad(0);
    bool runs = call->mode == Mode::kFull && needs_h;
    for (size_t i = 1; i < picks.size() && !runs; ++i) runs = ctx->needs_input_grad(i);

    if (runs) {
      const auto saved = ctx->get_saved_variables();
      variable_list inputs;
      inputs.reserve(kernel.sources().size());
      size_t next = 0;
      for (const auto& source : kernel.sources()) {
        inputs.push_back(source.kind == Source::Kind::kGradOutput ? grads[0].contiguous()
                                                                  : saved[next++]);
      }
      const auto outputs = kernel.RunBackward(std::move(inputs));
      for (size_t i = call->mode == Mode::kFull ? 0 : 1; i < picks.size(); ++i) {
        if (picks[i] >= 0 && ctx->needs_input_grad(i)) result[i] = outputs[picks[i]];
      }
    }
    if (needs_h && call->mode == Mode::kTraining) result[0] = grads[0];
    if (needs_h && call->mode == Mode::kGrafting) {
      // Not a multiplication at alpha = 1: the host is cut off even from an infinite gradient.
      result[0] = call->alpha == 1.0 ? at::zeros_like(grads[0]) : at::mul(grads[0], 1.0 - call->alpha);
    }
    return result;
  }
};

bool RequiresGrad(const at::Tensor& tensor) { return tensor.requires_grad(); }

}  // namespace

at::Tensor ApplySeed(const at::Tensor& h, const variable_list& params,
                     const c10::intrusive_ptr<SeedKernel>& kernel, double alpha, Mode mode) {
  const bool grad = at::GradMode::is_enabled();
  const bool learns = grad && std::any_of(params.begin(), params.end(), RequiresGrad);
  if (mode == Mode::kTraining && !learns) return h;
  if (!learns && !(grad && h.requires_grad())) {
    return kernel->RunForward(ForwardInputs(*kernel, h, params, alpha, mode))[0];
  }
  return SeedNode::apply(h, at::TensorList(params), c10::make_intrusive<Call>(kernel, alpha, mode));
}

}  // namespace esper
