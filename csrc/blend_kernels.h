#pragma once

#include <cstddef>

#include <ATen/core/Tensor.h>

// The passes over memory behind Blend. All tensors are dense and contiguous, of one element
// type (float, double, bfloat16 or half), on one device, and have the same number of elements.
// No autograd here.

namespace esper {

struct Grads {
  at::Tensor h;
  at::Tensor s;
};

at::Tensor BlendForwardCpu(const at::Tensor& h, const at::Tensor& s, double alpha);
Grads BlendBackwardCpu(const at::Tensor& grad, double alpha);

#ifdef ESPER_WITH_CUDA
// Asynchronous, on the current stream of the tensors' device.
at::Tensor BlendForwardCuda(const at::Tensor& h, const at::Tensor& s, double alpha);
Grads BlendBackwardCuda(const at::Tensor& grad, double alpha);
#endif

}  // namespace esper
