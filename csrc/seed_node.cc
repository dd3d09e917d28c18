#include "seed_node.h"

#include <algorithm>
#include <mutex>
#include <utility>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/detach.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include "plain.h"

namespace esper {
namespace {

namespace ag = torch::autograd;

// torch's custom Function does the same with a context of hash maps and boxed values; built by
// hand, a call is a microsecond cheaper.
//
// Only what the backward reads is saved, through SavedVariable: that is what notices an in-place
// change between forward and backward, honours saved-tensor hooks, and frees early.
//
// Invariants: all but `saved` and `released` is fixed before the graph is seen by anyone; those two
// are guarded by the node's own mutex, as in torch's nodes, for a graph may be gone through by two
// threads at a time.
struct SeedNode : ag::Node {
  std::string name() const override { return "EsperSeedBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : saved) variable.reset_data();
    released = true;
  }

  // What was saved, in the order of sources().
  Tensors Unpack() {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released,
                "the graph was gone through a second time; its saved tensors were freed by the "
                "first. Pass retain_graph=True to the first backward");
    Tensors unpacked;
    unpacked.reserve(saved.size());
    const auto self = c10::intrusive_ptr<ag::Node>::reclaim_copy(this);
    for (auto& variable : saved) unpacked.push_back(variable.unpack(self));
    return unpacked;
  }

  ag::variable_list apply(ag::variable_list&& grads) override {
    CheckFirstDerivative();
    std::vector<bool> needs(kernel->gradients().size());
    for (size_t i = 0; i < needs.size(); ++i) needs[i] = task_should_compute_output(i);
    const Tensors unpacked = Unpack();  // outlives the run, which may not let go of the last one
    if (!grads[0].defined()) return ag::variable_list(needs.size());
    try {
      return RunSeedBackward(*kernel, unpacked, grads[0], alpha, mode, needs);
    } catch (const std::exception& e) {
      if (sink == nullptr) throw;
      sink->Fail(std::string("backward: ") + e.what());
    }
    ag::variable_list passed(needs.size());
    if (needs[0]) passed[0] = grads[0];
    return passed;
  }

  c10::intrusive_ptr<SeedKernel> kernel;
  double alpha = 0;
  Mode mode = Mode::kFull;
  std::shared_ptr<FailureSink> sink;  // null: a failure is thrown
  std::vector<ag::SavedVariable> saved;
  bool released = false;
};

bool RequiresGrad(const at::Tensor& tensor) { return tensor.requires_grad(); }

// Compiled code gives its results in plain order; a channels-last host goes on in its own.
at::Tensor InOrderOf(const at::Tensor& h, at::Tensor out) {
  if (h.is_contiguous()) return out;
  return out.contiguous(h.suggest_memory_format());
}

}  // namespace

void CheckFirstDerivative() {
  TORCH_CHECK(!at::GradMode::is_enabled(),
              "a second derivative was asked for (create_graph=True) through a compiled seed; its "
              "backward is compiled too and has no derivative. Leave create_graph off, or cull "
              "the seed first");
}

Forward RunSeedForward(SeedKernel& kernel, const at::Tensor& h, const Tensors& params,
                       double alpha, bool save) {
  at::AutoDispatchBelowADInplaceOrView below;
  at::AutoGradMode no_grad(false);
  Tensors inputs;
  inputs.reserve(params.size() + 2);
  inputs.push_back(Materialized(h));
  inputs.push_back(kernel.alphas().Get(alpha, h.device()));
  for (const auto& param : params) inputs.push_back(Materialized(param));
  Forward result;
  if (!save) {
    result.out = std::move(kernel.RunForward(std::move(inputs))[0]);
    return result;
  }
  Tensors outputs = kernel.RunForward(inputs);
  result.out = std::move(outputs[0]);
  bool shared = false;
  result.saved.reserve(kernel.sources().size());
  for (const auto& source : kernel.sources()) {
    if (source.kind == Source::Kind::kForwardInput) result.saved.push_back(inputs[source.index]);
    if (source.kind == Source::Kind::kForwardOutput) {
      const auto& output = source.index == 0 ? result.out : outputs[source.index];
      shared |= output.is_alias_of(result.out);
      result.saved.push_back(output);
    }
  }
  if (shared) result.out = result.out.clone();
  return result;
}

Tensors RunSeedBackward(SeedKernel& kernel, const Tensors& saved, const at::Tensor& grad,
                        double alpha, Mode mode, const std::vector<bool>& needs) {
  at::AutoDispatchBelowADInplaceOrView below;
  const auto& picks = kernel.gradients();
  Tensors result(picks.size());
  const size_t first = mode == Mode::kFull ? 0 : 1;
  if (std::any_of(needs.begin() + first, needs.end(), [](bool need) { return need; })) {
    Tensors inputs;
    inputs.reserve(kernel.sources().size());
    size_t next = 0;
    for (const auto& source : kernel.sources()) {
      inputs.push_back(source.kind == Source::Kind::kGradOutput ? Materialized(grad)
                                                                : saved[next++]);
    }
    Tensors outputs = kernel.RunBackward(std::move(inputs));
    for (size_t i = first; i < picks.size(); ++i) {
      if (picks[i] >= 0 && needs[i]) result[i] = outputs[picks[i]];
    }
  }
  if (needs[0] && mode == Mode::kTraining) result[0] = grad;
  if (needs[0] && mode == Mode::kGrafting) {
    // Not a multiplication at alpha = 1: the host is cut off even from an infinite gradient.
    result[0] = alpha == 1.0 ? at::zeros_like(grad) : at::mul(grad, 1.0 - alpha);
  }
  return result;
}

at::Tensor ApplySeed(const at::Tensor& h, const Tensors& params,
                     const c10::intrusive_ptr<SeedKernel>& kernel, double alpha, Mode mode,
                     std::shared_ptr<FailureSink> sink) {
  const bool grad = at::GradMode::is_enabled();
  const bool learns = grad && std::any_of(params.begin(), params.end(), RequiresGrad);
  if (mode == Mode::kTraining && !learns) return h;
  if (!learns && !(grad && h.requires_grad())) {
    return InOrderOf(h, RunSeedForward(*kernel, h, params, alpha, false).out);
  }
  const auto node = c10::make_intrusive<SeedNode>();
  node->kernel = kernel;
  node->alpha = alpha;
  node->mode = mode;
  node->sink = std::move(sink);
  ag::edge_list edges;
  edges.reserve(params.size() + 1);
  edges.push_back(ag::impl::gradient_edge(h));
  for (const auto& param : params) edges.push_back(ag::impl::gradient_edge(param));
  node->set_next_edges(std::move(edges));

  at::Tensor out;
  Tensors saved;
  if (mode == Mode::kTraining) {
    // The caller gets h itself back, and what it does to it next (an in-place activation, say)
    // must not reach what is saved: the seed runs on a copy.
    const at::Tensor copy = h.detach().clone(at::MemoryFormat::Contiguous);
    saved = RunSeedForward(*kernel, copy, params, 1.0, true).saved;
    // The same memory under a new name, with this node behind it. It shares h's version counter,
    // so that an in-place change of either is noticed by whoever saved the other.
    at::AutoDispatchBelowADInplaceOrView below;
    out = at::detach(h);
    ag::impl::set_version_counter(out, ag::impl::version_counter(h));
  } else {
    Forward forward = RunSeedForward(*kernel, h, params, alpha, true);
    out = InOrderOf(h, std::move(forward.out));
    saved = std::move(forward.saved);
  }
  ag::set_history(out, node);
  node->saved.reserve(saved.size());
  for (const auto& tensor : saved) node->saved.emplace_back(tensor, false);
  return out;
}

}  // namespace esper
