// A device without hardware, to see what an upload asks of one.
//
// It stands in torch's place for devices of its own (PrivateUse1): its memory is the host's, its
// streams and events are numbers, and everything that is asked of it is written down, in order.
// Loaded by tests/kasmina/test_upload.py.

#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

namespace {

constexpr auto kType = c10::DeviceType::PrivateUse1;

std::vector<std::string> said;
int64_t current = 0;  // stream

void Say(const std::string& what) { said.push_back(what); }
std::string On(const c10::Stream& stream) { return " on stream " + std::to_string(stream.id()); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device) const override { return {kType, 0}; }
  c10::Device getDevice() const override { return {kType, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream At(int64_t id) const {
    return c10::Stream(c10::Stream::UNSAFE, {kType, 0}, id);
  }
  c10::Stream getStream(c10::Device) const override { return At(current); }
  c10::Stream getDefaultStream(c10::Device) const override { return At(0); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return At(7); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const auto before = At(current);
    current = stream.id();
    return before;
  }
  void record(void** event, const c10::Stream& stream, c10::DeviceIndex,
              c10::EventFlag) const override {
    *event = this->event();
    Say("record" + On(stream));
  }
  void block(void*, const c10::Stream& stream) const override { Say("block" + On(stream)); }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream& stream) const override {
    Say("keep" + On(stream));
  }
  bool queryEvent(void*) const override { return Say("the host asks an event"), true; }
  bool queryStream(const c10::Stream&) const override { return Say("the host asks"), true; }
  void synchronizeEvent(void*) const override { Say("the host waits for an event"); }
  void synchronizeStream(const c10::Stream&) const override { Say("the host waits"); }
  void synchronizeDevice(c10::DeviceIndex) const override { Say("the host waits for all"); }

 private:
  static void* event() {
    static int the;
    return &the;
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Memory final : c10::Allocator {
  explicit Memory(c10::Device device) : device(device) {}
  c10::DataPtr allocate(size_t size) override {
    Say(device.is_cpu() ? "pin" : "allocate on stream " + std::to_string(current));
    void* const data = std::malloc(size == 0 ? 1 : size);
    return {data, data, &std::free, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
  const c10::Device device;
};

Memory there({kType, 0}), pinned(c10::Device(c10::DeviceType::CPU));

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  void init() const override {}
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned; }
  bool isPinnedPtr(const void*) const override { return false; }
};

at::Tensor Empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
                 std::optional<at::MemoryFormat>) {
  return at::detail::empty_generic(size, &there, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   dtype.value_or(at::kFloat), std::nullopt);
}

at::Tensor EmptyStrided(c10::IntArrayRef size, c10::IntArrayRef stride,
                        std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                        std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      size, stride, &there, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
      dtype.value_or(at::kFloat));
}

at::Tensor CopyFrom(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  Say(std::string(non_blocking ? "copy" : "copy while the host waits") + " on stream " +
      std::to_string(current));
  std::memcpy(to.data_ptr(), from.data_ptr(), from.nbytes());
  return to;
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &Empty);
  m.impl("empty_strided", &EmptyStrided);
  m.impl("_copy_from", &CopyFrom);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  m.def("take_log", [] { return std::exchange(said, {}); });
  m.def("set_stream", [](int64_t id) { current = id; });
  m.def("read", [](const at::Tensor& t) {
    return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), at::kFloat).clone();
  });
}
