// The dispatcher's operators: what torch.compile sees of esper.
//
//   esper::slot           h and a slot's number -> a tensor like h; with autograd
//   esper::slot_forward   below autograd; beside the result a ticket for the backward
//   esper::slot_backward  below autograd; adds to the seeds' .grad, gives the gradient of h
//
// A compiler plans memory by these signatures alone: a tensor that nothing needs any more is
// overwritten in place. So h is an argument of the backward, though a ticket could carry it, and
// no result shares memory with what a ticket carries.
//
// `anchor` makes the result need a gradient where h needs none, so that seeds learn behind frozen
// layers; its own gradient is empty. What tells a compiler the shapes of all this is
// esper/kasmina/slot.py.
#include <atomic>
#include <bit>
#include <cstdint>
#include <memory>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include "fork.h"
#include "plain.h"
#include "slot.h"
#include "thread_annotations.h"

namespace esper {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What the backward of one call needs, of each seed that took part.
struct Leg {
  std::shared_ptr<RunningSeed> seed;
  RunningSeed::How how;
  Kept saved;                // undefined where the slot's own h has to be put
  std::vector<bool> is_h;    // as long as saved
};
using Trip = std::vector<Leg>;

// Trips under way, by the number in their ticket.
//
// A ticket is a tensor of one double that has the number as its bits: a value so near to zero that
// two tickets compare as close, as the results of equal calls must.
//
// Invariant: a trip is here for exactly as long as the memory of the ticket that the forward
// gave; graphs, eager or compiled, keep that for as long as they may run their backward. A copy
// of a ticket is as good while the first one lives.
class Trips {
 public:
  static Trips& The() {
    static auto* const the = new Trips;  // never destroyed: tickets may outlive everything
    static const bool guarded = (AtFork(&BeforeFork, &AfterFork, &AfterFork), true);
    static_cast<void>(guarded);
    return *the;
  }

  at::Tensor Enter(Trip trip) {
    if (trip.empty()) {
      at::Tensor nowhere = at::empty({1}, at::kDouble);
      *nowhere.mutable_data_ptr<double>() = Write(0);
      return nowhere;
    }
    const uint64_t number = ++last_;
    {
      const Locked lock(mutex_);
      trips_[number] = std::make_shared<const Trip>(std::move(trip));
    }
    auto* const memory = new double(Write(number));
    return at::for_blob(memory, {1})
        .context(memory, &Leave)
        .options(at::kDouble)
        .make_tensor();
  }

  // Null for a ticket of a call that no seed took part in.
  std::shared_ptr<const Trip> Find(const at::Tensor& ticket) {
    TORCH_CHECK_VALUE(ticket.scalar_type() == at::kDouble && ticket.numel() == 1 &&
                          ticket.is_cpu(),
                      "esper::slot_backward was given something that is no ticket of its forward");
    const uint64_t number = Read(*ticket.const_data_ptr<double>());
    if (number == 0) return nullptr;
    const Locked lock(mutex_);
    const auto found = trips_.find(number);
    TORCH_CHECK(found != trips_.end(),
                "the backward of a slot finds nothing under its ticket: the tensor that the "
                "forward saved was replaced by a copy and freed. Saved-tensor hooks that move or "
                "rewrite tensors (save_on_cpu, say) cannot be used around a compiled host that "
                "grows");
    return found->second;
  }

 private:
  // A child must not inherit a mutex that another thread of the parent held. The analysis cannot
  // follow a lock from one function to another.
  static void BeforeFork() ESPER_UNCHECKED { The().mutex_.Lock(); }
  static void AfterFork() ESPER_UNCHECKED { The().mutex_.Unlock(); }

  static double Write(uint64_t number) { return std::bit_cast<double>(number); }
  static uint64_t Read(double ticket) { return std::bit_cast<uint64_t>(ticket); }

  static void Leave(void* memory) {
    const std::unique_ptr<double> ticket(static_cast<double*>(memory));
    std::shared_ptr<const Trip> out;  // destroyed after the mutex is released
    auto& trips = The();
    const Locked lock(trips.mutex_);
    const auto found = trips.trips_.find(Read(*ticket));
    if (found == trips.trips_.end()) return;  // somebody wrote to the ticket
    out = std::move(found->second);
    trips.trips_.erase(found);
  }

  Mutex mutex_;
  std::unordered_map<uint64_t, std::shared_ptr<const Trip>> trips_ ESPER_GUARDED_BY(mutex_);
  std::atomic<uint64_t> last_{0};
};

Leg MakeLeg(std::shared_ptr<RunningSeed> seed, RunningSeed::How how, Tensors saved,
            const at::Tensor& h) {
  Leg leg{std::move(seed), how, {}, {}};
  for (auto& tensor : saved) {
    leg.is_h.push_back(tensor.is_same(h));
    if (leg.is_h.back()) {
      tensor = at::Tensor();
    } else if (tensor.is_alias_of(h)) {
      tensor = tensor.clone();
    }
  }
  leg.saved = Kept(std::move(saved));
  return leg;
}

bool Carries(const Trip& trip, const at::Tensor& tensor) {
  for (const auto& leg : trip) {
    for (const auto& saved : leg.saved.Get()) {
      if (saved.defined() && saved.is_alias_of(tensor)) return true;
    }
  }
  return false;
}

// As a tensor of its own, laid out as the compiler was told.
at::Tensor AsResult(const at::Tensor& x, const at::Tensor& like, bool shared) {
  TORCH_CHECK(x.sizes() == like.sizes(), "a slot was given ", like.sizes(), " and has ", x.sizes());
  // A dense tensor's like has its strides, others' get those of a contiguous one.
  if (!shared && like.is_non_overlapping_and_dense() && x.strides() == like.strides()) return x;
  at::Tensor out = at::empty_like(like);
  if (!shared && x.strides() == out.strides()) return x;
  return out.copy_(x);
}

std::tuple<at::Tensor, at::Tensor> SlotForward(const at::Tensor& h, int64_t number, bool learn) {
  at::AutoDispatchBelowADInplaceOrView below;
  at::AutoGradMode no_grad(false);
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  Trip trip;
  at::Tensor x = h;
  for (const auto& seed : *SeedsOf(number)) {
    const auto how = seed->how();
    const bool training = how.mode == Mode::kTraining;
    if (!how.on || (training ? !learn : how.alpha == 0.0)) continue;
    try {
      const at::Tensor in = x.to(seed->kernel->dtype());
      seed->kernel->CheckInputs(in, seed->params, how.alpha, how.mode);
      Forward forward =
          RunSeedForward(*seed->kernel, in, seed->params, training ? 1.0 : how.alpha, learn);
      TORCH_CHECK(forward.out.sizes() == in.sizes(), "the kernel gave ", forward.out.sizes(),
                  " for ", in.sizes(), "; it is not made for this site");
      if (learn) trip.push_back(MakeLeg(seed, how, std::move(forward.saved), h));
      if (training) continue;
      seed->MeasureDrift(in, forward.out);
      x = forward.out.to(h.scalar_type());
    } catch (const CallerError&) {
      throw;
    } catch (const python_error&) {
      throw;
    } catch (const std::exception& e) {
      seed->Fail(e.what());  // whatever a kernel does, what came in goes on
    }
  }
  at::Tensor out = AsResult(x, h, x.is_alias_of(h) || Carries(trip, x));
  return {std::move(out), Trips::The().Enter(std::move(trip))};
}

std::tuple<at::Tensor, at::Tensor> SlotBackward(const at::Tensor& grad, const at::Tensor& h,
                                                const at::Tensor& ticket) {
  at::AutoDispatchBelowADInplaceOrView below;
  at::AutoGradMode no_grad(false);
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  at::Tensor g = grad;
  if (const auto trip = Trips::The().Find(ticket)) {
    for (auto leg = trip->rbegin(); leg != trip->rend(); ++leg) {
      try {
        Tensors saved = leg->saved.Get();
        for (size_t i = 0; i < saved.size(); ++i) {
          if (leg->is_h[i]) saved[i] = h.contiguous();
        }
        g = leg->seed->Backward(saved, g, leg->how.alpha, leg->how.mode);
      } catch (const python_error&) {
        throw;
      } catch (const std::exception& e) {
        leg->seed->Fail(std::string("backward: ") + e.what());
      }
    }
  }
  return {AsResult(g, grad, g.is_alias_of(grad)), at::empty({0}, at::kFloat)};
}

std::tuple<at::Tensor, at::Tensor> CallForward(const at::Tensor& h, int64_t number, bool learn) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("esper::slot_forward", "")
                             .typed<decltype(SlotForward)>();
  return op.call(h, number, learn);
}

std::tuple<at::Tensor, at::Tensor> CallBackward(const at::Tensor& grad, const at::Tensor& h,
                                                const at::Tensor& ticket) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("esper::slot_backward", "")
                             .typed<decltype(SlotBackward)>();
  return op.call(grad, h, ticket);
}

struct SlotNode : torch::autograd::Function<SlotNode> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& h,
                            const std::optional<at::Tensor>& anchor, int64_t number) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [out, ticket] = CallForward(h, number, true);
    ctx->save_for_backward({h});
    ctx->saved_data["ticket"] = ticket;  // no matter for saved-tensor hooks
    ctx->saved_data["anchored"] = anchor.has_value() && anchor->defined();
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "a second derivative was asked for (create_graph=True) through a slot; compiled "
                "seeds have none. Leave create_graph off, or unwrap the model first");
    auto [g, nothing] = CallBackward(grads[0], ctx->get_saved_variables()[0],
                                     ctx->saved_data["ticket"].toTensor());
    if (!ctx->saved_data["anchored"].toBool()) nothing = at::Tensor();
    // As autograd frees what it saved: a loss that is kept must not keep every activation.
    if (!torch::autograd::get_current_graph_task_keep_graph()) ctx->saved_data.erase("ticket");
    return {g, nothing, at::Tensor()};
  }
};

// Under a transform of torch.func nothing may be behind the slot: what is compiled cannot follow.
at::Tensor SlotTransformed(const at::Tensor& h, const std::optional<at::Tensor>&, int64_t number) {
  for (const auto& seed : *SeedsOf(number)) {
    if (seed->how().on) RefuseTransformed();
  }
  return h.clone();
}

at::Tensor SlotAutograd(const at::Tensor& h, const std::optional<at::Tensor>& anchor,
                        int64_t number) {
  if (IsWrapped(h)) return SlotTransformed(h, anchor, number);
  const bool anchored = anchor.has_value() && anchor->defined() && anchor->requires_grad();
  if (at::GradMode::is_enabled() && (h.requires_grad() || anchored)) {
    return SlotNode::apply(h, anchor, number);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return std::get<0>(CallForward(h, number, false));
}

at::Tensor SlotBelow(const at::Tensor& h, const std::optional<at::Tensor>&, int64_t number) {
  return std::get<0>(CallForward(h, number, false));
}

}  // namespace
}  // namespace esper

TORCH_LIBRARY(esper, m) {
  m.def("slot(Tensor h, Tensor? anchor, int number) -> Tensor");
  m.def("slot_forward(Tensor h, int number, bool learn) -> (Tensor, Tensor)");
  m.def("slot_backward(Tensor grad, Tensor h, Tensor ticket) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(esper, CompositeExplicitAutograd, m) {
  m.impl("slot", &esper::SlotBelow);
  m.impl("slot_forward", &esper::SlotForward);
  m.impl("slot_backward", &esper::SlotBackward);
}

TORCH_LIBRARY_IMPL(esper, Autograd, m) { m.impl("slot", &esper::SlotAutograd); }
TORCH_LIBRARY_IMPL(esper, FuncTorchBatched, m) { m.impl("slot", &esper::SlotTransformed); }
