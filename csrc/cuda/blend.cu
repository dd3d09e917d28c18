#include <ATen/Dispatch.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include "../blend_kernels.h"
#include "blend_device.h"

namespace esper {
namespace {

int Multiprocessors() { return at::cuda::getCurrentDeviceProperties()->multiProcessorCount; }

}  // namespace

void BlendForwardCuda(const at::Tensor& out, const at::Tensor& h, const at::Tensor& s,
                      double alpha) {
  const c10::cuda::CUDAGuard on_device(h.device());
  const cudaStream_t stream = at::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, h.scalar_type(), "esper_blend_forward", [&] {
        // The pointer that is written first: asking for it may move a lazily copied tensor.
        auto* const o = out.mutable_data_ptr<scalar_t>();
        device::LaunchLerp(o, h.const_data_ptr<scalar_t>(), s.const_data_ptr<scalar_t>(), alpha,
                           h.numel(), Multiprocessors(), stream);
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      });
}

void BlendBackwardCuda(const Grads& out, const at::Tensor& grad, double alpha) {
  const c10::cuda::CUDAGuard on_device(grad.device());
  const cudaStream_t stream = at::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, grad.scalar_type(), "esper_blend_backward", [&] {
        auto* const gh = out.h.mutable_data_ptr<scalar_t>();
        auto* const gs = out.s.mutable_data_ptr<scalar_t>();
        device::LaunchSplit(gh, gs, grad.const_data_ptr<scalar_t>(), alpha, grad.numel(),
                            Multiprocessors(), stream);
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      });
}

}  // namespace esper
