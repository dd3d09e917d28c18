// The dispatcher's operators: what torch.compile sees of esper.
//
//   esper::slot           h and a slot's number -> a tensor like h; with autograd
//   esper::slot_forward   below autograd; beside the result a ticket for the backward
//   esper::slot_backward  below autograd; adds to the seeds' .grad, gives the gradient of h
#include <memory>
#include <utility>
#include <vector>

#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "seed_node.h"
#include "slot.h"

namespace esper {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What the backward of one call needs. It lives as long as the memory of the call's ticket, a
// tensor: graphs, eager or compiled, keep that for as long as they may run their backward.
struct Trip {
  struct Leg {
    std::shared_ptr<SlotSeed> seed;
    SlotSeed::How how;
    Tensors saved;
  };
  std::vector<Leg> legs;
};

void EndTrip(void* trip) { delete static_cast<Trip*>(trip); }

// Of no elements, so that nothing ever reads or copies it: only its memory's owner matters.
at::Tensor MakeTicket(std::unique_ptr<Trip> trip, const at::Tensor& h) {
  static char nothing = 0;
  return at::for_blob(&nothing, {0})
      .context(trip.release(), &EndTrip)
      .options(h.options().dtype(at::kByte))
      .target_device(h.device())
      .make_tensor();
}

const Trip& ReadTicket(const at::Tensor& ticket) {
  const auto& memory = ticket.storage().data_ptr();
  TORCH_CHECK(memory.get_deleter() == &EndTrip,
              "esper::slot_backward was given a copy of its forward's ticket; a ticket must reach "
              "the backward as the very tensor that the forward gave");
  return *static_cast<const Trip*>(memory.get_context());
}

bool LaidOutLike(const at::Tensor& tensor, const at::Tensor& like) {
  return tensor.strides() == like.strides();
}

std::tuple<at::Tensor, at::Tensor> SlotForward(const at::Tensor& h, int64_t number, bool learn) {
  auto trip = std::make_unique<Trip>();
  at::Tensor x = h;
  for (const auto& seed : *SeedsOf(number)) {
    const auto how = seed->how();
    const bool training = how.mode == Mode::kTraining;
    if (!how.on || (training ? !learn : how.alpha == 0.0)) continue;
    try {
      const auto type = seed->kernel->dtype();
      const at::Tensor in = x.scalar_type() == type ? x : x.to(type);
      seed->kernel->CheckInputs(in, seed->params, how.alpha, how.mode);
      Forward forward =
          RunSeedForward(*seed->kernel, in, seed->params, how.alpha, how.mode, learn);
      if (!training) {
        if (seed->WantsDrift()) {
          seed->SetDrift(at::linalg_vector_norm(forward.out - in) / at::linalg_vector_norm(in));
        }
        x = forward.out.to(h.scalar_type());
      }
      if (learn) trip->legs.push_back({seed, how, std::move(forward.saved)});
    } catch (const std::exception& e) {
      seed->Fail(e.what());  // whatever a kernel does, what came in goes on
    }
  }
  // An operator's result is never its input, and its layout is what the compiler was told.
  at::Tensor out = at::empty_like(h);
  if (x.is_same(h) || !LaidOutLike(x, out)) {
    out.copy_(x);
  } else {
    out = x;
  }
  return {out, MakeTicket(std::move(trip), h)};
}

void Accumulate(const at::Tensor& param, const at::Tensor& gradient) {
  auto& grad = const_cast<at::Tensor&>(param).mutable_grad();
  if (grad.defined()) {
    grad = grad + gradient;
  } else {
    grad = gradient;
  }
}

at::Tensor SlotBackward(const at::Tensor& grad, const at::Tensor& ticket) {
  at::Tensor g = grad;
  const auto& legs = ReadTicket(ticket).legs;
  for (auto leg = legs.rbegin(); leg != legs.rend(); ++leg) {
    const auto& [seed, how, saved] = *leg;
    try {
      std::vector<bool> needs(seed->params.size() + 1, true);
      for (size_t i = 1; i < needs.size(); ++i) needs[i] = seed->params[i - 1].requires_grad();
      const at::Tensor in = g.to(seed->kernel->dtype());
      const Tensors found =
          RunSeedBackward(*seed->kernel, saved, in, how.alpha, how.mode, needs);
      for (size_t i = 1; i < needs.size(); ++i) {
        if (found[i].defined()) Accumulate(seed->params[i - 1], found[i]);
      }
      g = found[0].to(grad.scalar_type());
    } catch (const std::exception& e) {
      seed->Fail(std::string("backward: ") + e.what());
    }
  }
  at::Tensor out = at::empty_like(grad);
  if (!g.is_same(grad) && LaidOutLike(g, out)) return g;
  return out.copy_(g);
}

std::tuple<at::Tensor, at::Tensor> CallForward(const at::Tensor& h, int64_t number, bool learn) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("esper::slot_forward", "")
                             .typed<decltype(SlotForward)>();
  return op.call(h, number, learn);
}

at::Tensor CallBackward(const at::Tensor& grad, const at::Tensor& ticket) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("esper::slot_backward", "")
                             .typed<decltype(SlotBackward)>();
  return op.call(grad, ticket);
}

struct SlotNode : torch::autograd::Function<SlotNode> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& h, int64_t number) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [out, ticket] = CallForward(h, number, true);
    ctx->save_for_backward({ticket});
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "a second derivative was asked for (create_graph=True) through a slot; compiled "
                "seeds have none. Leave create_graph off, or unwrap the model first");
    return {CallBackward(grads[0], ctx->get_saved_variables()[0]), at::Tensor()};
  }
};

at::Tensor SlotAutograd(const at::Tensor& h, int64_t number) {
  if (at::GradMode::is_enabled() && h.requires_grad()) return SlotNode::apply(h, number);
  at::AutoDispatchBelowADInplaceOrView below;
  return std::get<0>(CallForward(h, number, false));
}

at::Tensor SlotBelow(const at::Tensor& h, int64_t number) {
  return std::get<0>(CallForward(h, number, false));
}

std::tuple<at::Tensor, at::Tensor> SlotForwardMeta(const at::Tensor& h, int64_t, bool) {
  return {at::empty_like(h), at::empty({0}, h.options().dtype(at::kByte))};
}

at::Tensor SlotBackwardMeta(const at::Tensor& grad, const at::Tensor&) {
  return at::empty_like(grad);
}

}  // namespace
}  // namespace esper

TORCH_LIBRARY(esper, m) {
  m.def("slot(Tensor h, int number) -> Tensor");
  m.def("slot_forward(Tensor h, int number, bool learn) -> (Tensor, Tensor)");
  m.def("slot_backward(Tensor grad, Tensor ticket) -> Tensor");
}

TORCH_LIBRARY_IMPL(esper, CompositeExplicitAutograd, m) {
  m.impl("slot", &esper::SlotBelow);
  m.impl("slot_forward", &esper::SlotForward);
  m.impl("slot_backward", &esper::SlotBackward);
}

TORCH_LIBRARY_IMPL(esper, Autograd, m) { m.impl("slot", &esper::SlotAutograd); }

TORCH_LIBRARY_IMPL(esper, Meta, m) {
  m.impl("slot", [](const at::Tensor& h, int64_t) { return at::empty_like(h); });
  m.impl("slot_forward", &esper::SlotForwardMeta);
  m.impl("slot_backward", &esper::SlotBackwardMeta);
}
