#include "upload.h"

#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace esper {
namespace {

at::Device WithIndex(at::Device device) {
  if (device.is_cpu() || device.has_index()) return device;
  return c10::impl::VirtualGuardImpl(device.type()).getDevice();  // the current one
}

}  // namespace

Upload::Upload(const std::vector<at::Tensor>& host, at::Device device)
    : device_(WithIndex(device)) {
  for (const auto& tensor : host) {
    TORCH_CHECK_VALUE(tensor.is_cpu(), "a tensor on ", tensor.device(), " was given to upload to ",
                      device_, "; uploads start on the CPU");
  }
  if (device_.is_cpu()) {
    tensors_ = host;
    return;
  }
  const c10::impl::VirtualGuardImpl backend(device_.type());
  const c10::Stream side = backend.getStreamFromGlobalPool(device_, /*isHighPriority=*/false);
  // Memory that is asked for under the side stream belongs to it, so that nothing has to wait
  // for what other streams did with that memory before.
  const c10::StreamGuard on_side(side);
  tensors_.reserve(host.size());
  for (const auto& tensor : host) {
    at::Tensor there = at::empty_like(tensor, tensor.options().device(device_));
    // The pinned copy may go at once: its allocator keeps the memory until this stream is past it.
    there.copy_(tensor.pin_memory(), /*non_blocking=*/true);
    tensors_.push_back(std::move(there));
  }
  copied_ = std::make_unique<c10::Event>(device_.type());
  copied_->record(side);
}

void Upload::Join() const {
  if (copied_ == nullptr) return;
  const c10::impl::VirtualGuardImpl backend(device_.type());
  const c10::Stream current = backend.getStream(device_);
  copied_->block(current);
  for (const auto& tensor : tensors_) {
    backend.recordDataPtrOnStream(tensor.storage().data_ptr(), current);
  }
}

}  // namespace esper
