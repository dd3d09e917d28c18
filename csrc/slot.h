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

// One seed behind a slot: what to run, on which parameters, and how at this moment.
//
// Invariants: kernel and parameters never change. How it runs is written by the training thread
// between steps, and may be read by a backward at any time. A seed whose kernel threw lets the
// tensor pass from then on, until it is removed.
class SlotSeed {
 public:
  SlotSeed(c10::intrusive_ptr<SeedKernel> kernel, Tensors params)
      : kernel(std::move(kernel)), params(std::move(params)) {}

  // A null mode switches the seed off.
  void Set(double alpha, const Mode* mode) ESPER_EXCLUDES(mutex_);

  struct How {
    bool on;
    double alpha;
    Mode mode;
  };
  How how() const ESPER_EXCLUDES(mutex_);

  void Fail(const std::string& why) ESPER_EXCLUDES(mutex_);  // the first one is kept
  std::string failure() const ESPER_EXCLUDES(mutex_);        // empty: none

  // Asks for |out - h| / |h| of the next forward; the answer is taken once, undefined till then.
  void AskForDrift() { wants_drift_ = true; }
  bool WantsDrift() { return wants_drift_.exchange(false); }
  void SetDrift(at::Tensor drift) ESPER_EXCLUDES(mutex_);
  at::Tensor TakeDrift() ESPER_EXCLUDES(mutex_);

  const c10::intrusive_ptr<SeedKernel> kernel;
  const Tensors params;

 private:
  mutable Mutex mutex_;
  How how_ ESPER_GUARDED_BY(mutex_){false, 0.0, Mode::kFull};
  std::string failure_ ESPER_GUARDED_BY(mutex_);
  at::Tensor drift_ ESPER_GUARDED_BY(mutex_);
  std::atomic<bool> wants_drift_{false};
};

// A place in a compiled host behind which seeds come and go, known to its graph by a number.
//
// torch.ops.esper.slot(h, number) gives h, changed by the seeds in their order. For the compiler
// it is one operator from h to a tensor like h: parameters are no inputs of it. Their gradients
// are added to `.grad` by the operator's backward itself.
//
// Numbers are never given out twice. A graph whose slot is gone passes its tensor on.
class Slot {
 public:
  using Seeds = std::vector<std::shared_ptr<SlotSeed>>;

  Slot();
  ~Slot();
  Slot(const Slot&) = delete;
  Slot& operator=(const Slot&) = delete;

  int64_t number() const { return number_; }
  void SetSeeds(Seeds seeds);

 private:
  const int64_t number_;
};

// The seeds behind slot `number` at this moment; empty for a slot that is gone.
std::shared_ptr<const Slot::Seeds> SeedsOf(int64_t number);

}  // namespace esper
