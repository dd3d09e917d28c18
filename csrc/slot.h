#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "running_seed.h"

namespace esper {

// A place in a compiled host behind which seeds come and go, known to its graph by a number.
//
// torch.ops.esper.slot(h, anchor, number) gives h, changed by the seeds in their order. For the
// compiler it is one operator from h to a tensor like h: parameters are no inputs of it. Their
// gradients are added to `.grad` by the operator's backward itself.
//
// Invariants: numbers are never given out twice. A graph whose slot is gone passes its tensor on.
//
// Thread-safe; what SetSeeds replaced is let go by whoever last runs it.
class Slot {
 public:
  using Seeds = std::vector<std::shared_ptr<RunningSeed>>;

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
