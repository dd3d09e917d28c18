#pragma once

#include <vector>

#include <ATen/core/Tensor.h>

#include "seed_kernel.h"

namespace esper {

// Runs `kernel` as one node of the autograd graph. Where no gradient can be asked for, nothing
// is saved and no node is made; in TRAINING that means `h` is returned and nothing runs.
// Arguments have been checked by SeedKernel::Run.
at::Tensor ApplySeed(const at::Tensor& h, const std::vector<at::Tensor>& params,
                     const c10::intrusive_ptr<SeedKernel>& kernel, double alpha, Mode mode);

}  // namespace esper
