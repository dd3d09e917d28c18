#pragma once

#include <memory>
#include <vector>

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>

namespace esper {

// Tensors on their way to a device, over pinned memory, on a stream of their own.
//
// Device-generic: streams and events come from whatever backend torch has registered for the
// device. On the CPU nothing is copied, and Join does nothing.
//
// Invariants: `tensors` are complete on a stream once Join has been called with it current; no
// stream but the upload's own may use them before that. Nothing here makes the host wait for the
// device.
//
// Thread-safe: any thread may call Join, for the stream that is current on it.
class Upload {
 public:
  // Starts the copies. Throws c10::ValueError for tensors that are not on the CPU, and c10::Error
  // where this torch has no such device.
  Upload(const std::vector<at::Tensor>& host, at::Device device);
  Upload(const Upload&) = delete;
  Upload& operator=(const Upload&) = delete;

  // Lets the current stream of the device wait for the copies, and keeps the tensors' memory from
  // being given to others before that stream is through with it.
  void Join() const;

  const std::vector<at::Tensor>& tensors() const { return tensors_; }

 private:
  const at::Device device_;
  std::vector<at::Tensor> tensors_;
  std::unique_ptr<c10::Event> copied_;  // null on the CPU
};

}  // namespace esper
