#pragma once

#include <cstddef>

#include <ATen/core/Tensor.h>

// The passes over memory behind Blend. All tensors fill their memory without gaps or overlaps, in
// one order, are of one element type (float, double, bfloat16 or half), on one device, and have
// the same number of elements. No autograd here.

namespace esper {

struct Grads {
  at::Tensor h;
  at::Tensor s;
};

// `out` may be `h` or `s`.
void BlendForwardCpu(const at::Tensor& out, const at::Tensor& h, const at::Tensor& s,
                     double alpha);
// Either gradient may be `grad` itself.
void BlendBackwardCpu(const Grads& out, const at::Tensor& grad, double alpha);

#ifdef ESPER_WITH_CUDA
// Asynchronous, on the current stream of the tensors' device.
void BlendForwardCuda(const at::Tensor& out, const at::Tensor& h, const at::Tensor& s,
                      double alpha);
void BlendBackwardCuda(const Grads& out, const at::Tensor& grad, double alpha);
#endif

}  // namespace esper
