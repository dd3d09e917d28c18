#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "seed_kernel.h"
#include "seed_node.h"
#include "thread_annotations.h"

namespace esper {

// Tensors kept for a backward outside of autograd, which would notice an in-place change.
//
// Invariant: Get throws where one of them was written to since it was kept.
class Kept {
 public:
  Kept() = default;
  explicit Kept(Tensors tensors);
  const Tensors& Get() const;  // throws c10::Error

 private:
  Tensors tensors_;
  std::vector<int64_t> versions_;
};

// One seed as it runs: what, on which parameters, and how at this moment.
//
// Invariants: kernel and parameters never change; parameters are leaves. How it runs is written
// by the training thread between steps, and may be read by any thread at any time. A seed whose
// kernel threw lets tensors pass from then on.
//
// Thread-safe. No method that runs a kernel may be called with the GIL held.
class RunningSeed : public FailureSink, public std::enable_shared_from_this<RunningSeed> {
 public:
  // Throws c10::ValueError for a parameter that is no leaf: its gradient could not be kept.
  RunningSeed(c10::intrusive_ptr<SeedKernel> kernel, Tensors params);

  // Throws c10::ValueError for an alpha outside of [0, 1].
  void Set(double alpha, Mode mode);
  void Off();

  struct How {
    bool on;
    double alpha;
    Mode mode;
  };
  How how() const;

  // The site's output `h`, changed by the seed; `h` itself where it has no influence, and where
  // the kernel fails, then or in the backward. One node of the autograd graph, but for a seed in
  // TRAINING beside a host that learns, see Learn. CallerError passes through, and so do errors
  // that are Python's own (a hook on saved tensors that stops a recomputation, say).
  at::Tensor Call(const at::Tensor& h) ESPER_EXCLUDES(mutex_);

  // Adds the gradients of the parameters to their `.grad`, as autograd's own accumulation does,
  // and returns that of the seed's input; `grad` and what is returned are of the caller's type.
  // `saved` comes from a forward in the same mode and alpha.
  at::Tensor Backward(const Tensors& saved, const at::Tensor& grad, double alpha, Mode mode);

  void Fail(const std::string& why) override ESPER_EXCLUDES(mutex_);  // the first one is kept
  std::string failure() const ESPER_EXCLUDES(mutex_);        // empty: none

  // Asks for |out - h| / |h| of the calls until it is taken: the largest, for a module may be called
  // several times in a forward. Undefined where there was no call.
  void AskForDrift() { wants_drift_ = true; }
  void MeasureDrift(const at::Tensor& h, const at::Tensor& out) ESPER_EXCLUDES(mutex_);
  at::Tensor TakeDrift() ESPER_EXCLUDES(mutex_);

  const c10::intrusive_ptr<SeedKernel> kernel;
  const Tensors params;

 private:
  // Learn from the gradient that arrives at h, while h itself goes on as it is. The seed runs on
  // a copy of h, as at alpha = 1; its own backward is started by a hook on h. So the very tensor
  // of the host is what its next layer sees, in-place ones included, and what fails stays here.
  void Learn(const at::Tensor& h) ESPER_EXCLUDES(mutex_);
  at::Tensor CopyOf(const at::Tensor& h) ESPER_EXCLUDES(mutex_);

  // Alpha, whose two highest bits are never set, for it is within 0 and 1, with how it is to be run
  // in their place. Read by every call, and so without a lock that a forked child could inherit.
  std::atomic<uint64_t> how_;
  std::atomic<bool> failed_{false};

  mutable Mutex mutex_;  // taken by ForkSafe only
  std::string failure_ ESPER_GUARDED_BY(mutex_);
  at::Tensor drift_ ESPER_GUARDED_BY(mutex_);
  at::Tensor copy_ ESPER_GUARDED_BY(mutex_);  // Learn's last copy, written again once it is free
  std::atomic<bool> wants_drift_{false};
};

}  // namespace esper
