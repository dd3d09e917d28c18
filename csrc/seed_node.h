#pragma once

#include <memory>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "seed_kernel.h"

namespace esper {

using Tensors = std::vector<at::Tensor>;

// A forward half that ran, below autograd.
struct Forward {
  at::Tensor out;  // shares no memory with `saved`: who gets it may write to it
  Tensors saved;   // what the backward half reads beside the gradient, in the order of sources()
};

// Where a failure of compiled code is told, so that it need not end the training.
struct FailureSink {
  virtual ~FailureSink() = default;
  virtual void Fail(const std::string& why) = 0;  // any thread, at any time
};

// Throws c10::Error in a backward that is to be differentiated itself.
void CheckFirstDerivative();

// Runs the forward half at `alpha`. `h` and `params` have been checked by
// SeedKernel::CheckInputs. With `save`, what the backward reads is kept as it is, nothing is
// copied: `h` must not be written to until the backward has run.
Forward RunSeedForward(SeedKernel& kernel, const at::Tensor& h, const Tensors& params,
                       double alpha, bool save);

// Runs the backward half where one of `needs` asks for it: the gradients of h and of each
// parameter, undefined where not needed. `needs` has one entry for h and one for each parameter.
Tensors RunSeedBackward(SeedKernel& kernel, const Tensors& saved, const at::Tensor& grad,
                        double alpha, Mode mode, const std::vector<bool>& needs);

// Runs `kernel` as one node of the autograd graph. Where no gradient can be asked for, nothing
// is saved and no node is made; in TRAINING that means `h` is returned and nothing runs. An `h`
// in channels-last order comes back in that order. Arguments have been checked by
// SeedKernel::CheckInputs.
//
// With `sink`, a backward half that throws is told there, and the gradient goes on to h as it
// came; without, it throws on. What autograd has against a backward throws in either case.
at::Tensor ApplySeed(const at::Tensor& h, const Tensors& params,
                     const c10::intrusive_ptr<SeedKernel>& kernel, double alpha, Mode mode,
                     std::shared_ptr<FailureSink> sink);

}  // namespace esper
