#include <array>
#include <atomic>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include "../launch_plan.h"

namespace esper {
namespace {

constexpr int kWithoutAsking = 48 << 10;  // more shared memory a kernel has to be allowed

// One cubin, loaded. Libraries of the runtime belong to no context: on every device on which the
// kernel is launched the runtime loads the code by itself, where the arch is the cubin's.
//
// Thread-safe.
class LoadedCubin {
 public:
  LoadedCubin(const CubinKernel& kernel, std::string_view code) {
    C10_CUDA_CHECK(cudaLibraryLoadData(&library_, code.data(), nullptr, nullptr, 0, nullptr,
                                       nullptr, 0));
    cudaKernel_t found = nullptr;
    const cudaError_t error = cudaLibraryGetKernel(&found, library_, kernel.name.c_str());
    if (error != cudaSuccess) {
      C10_CUDA_IGNORE_ERROR(cudaLibraryUnload(library_));
      C10_CUDA_CHECK(error);
    }
    function_ = static_cast<const void*>(found);
  }
  LoadedCubin(const LoadedCubin&) = delete;
  LoadedCubin& operator=(const LoadedCubin&) = delete;
  ~LoadedCubin() { C10_CUDA_IGNORE_ERROR(cudaLibraryUnload(library_)); }

  // Lets the kernel have its shared memory on the current device.
  void Allow(const CubinKernel& kernel, int device) {
    if (kernel.shared <= kWithoutAsking) return;
    const uint64_t bit = uint64_t{1} << (device & 63);
    if (allowed_.load() & bit) return;
    C10_CUDA_CHECK(cudaFuncSetAttribute(function_, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        kernel.shared));
    allowed_.fetch_or(bit);
  }
  const void* function() const { return function_; }

 private:
  cudaLibrary_t library_ = nullptr;
  const void* function_ = nullptr;
  std::atomic<uint64_t> allowed_{0};  // one bit for each device
};

class CubinLauncher : public Launcher {
 public:
  CubinLauncher(const LaunchPlan& plan, std::string_view cubins) {
    for (const auto& kernel : plan.kernels) {
      TORCH_CHECK_VALUE(kernel.offset <= cubins.size() &&
                            kernel.bytes <= cubins.size() - kernel.offset,
                        kernel.name, " ends beyond the cubins' ", cubins.size(), " bytes");
      loaded_.push_back(std::make_unique<LoadedCubin>(
          kernel, cubins.substr(kernel.offset, kernel.bytes)));
    }
  }

  void Launch(const CubinKernel& kernel, const LaunchCall& call) override {
    LoadedCubin& cubin = *loaded_[call.kernel];
    cubin.Allow(kernel, c10::cuda::current_device());
    // The runtime reads as many bytes of each as the kernel's own table of parameters says.
    std::vector<void*> arguments;
    arguments.reserve(call.values.size());
    for (const auto& value : call.values) arguments.push_back(const_cast<uint64_t*>(&value));
    C10_CUDA_CHECK(cudaLaunchKernel(
        cubin.function(), dim3(call.grid[0], call.grid[1], call.grid[2]),
        dim3(static_cast<unsigned>(kernel.threads)), arguments.data(),
        static_cast<size_t>(kernel.shared), c10::cuda::getCurrentCUDAStream()));
  }

 private:
  std::vector<std::unique_ptr<LoadedCubin>> loaded_;
};

}  // namespace

std::shared_ptr<Launcher> LoadCubins(const LaunchPlan& plan, std::string_view cubins) {
  TORCH_CHECK(c10::cuda::device_count() > 0,
              "a kernel is made of cubins, and this process sees no CUDA device; choose a kernel "
              "for cpu, or run where there is a GPU");
  return std::make_shared<CubinLauncher>(plan, cubins);
}

}  // namespace esper
