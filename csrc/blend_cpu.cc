// Compiled for AVX2 where the machine that builds has it (see CMakeLists.txt); nothing else of the
// extension but blend_avx512.cc is, and native.py refuses the library where AVX2 is missing.
#include <algorithm>

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include "blend_kernels.h"
#include "blend_loops.h"

namespace esper {
namespace {

// Below this many elements waking another thread costs more than it saves.
constexpr int64_t kGrain = 32768;
// Elements per block of the backward. The gradient is read from memory once and, for the second
// output, from the first-level cache: 2048 doubles are 16 KiB.
constexpr int64_t kBlock = 2048;

// Wider vectors pay for the 16-bit types, which are bound by their conversion to float32 while
// they are in a cache: twice as fast there.
template <typename T>
Loops<T> BestLoops() {
#ifdef ESPER_WITH_AVX512
  // torch's own answer, and with it its variable ATEN_CPU_CAPABILITY.
  if (at::get_cpu_capability() == "AVX512") return Avx512Loops<T>();
#endif
  return {&Lerp<T>, &Scale<T>};
}

}  // namespace

void BlendForwardCpu(const at::Tensor& out, const at::Tensor& h, const at::Tensor& s,
                     double alpha) {
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, h.scalar_type(), "esper_blend_forward", [&] {
        static const auto loops = BestLoops<scalar_t>();
        // The pointer that is written first: asking for it may move a lazily copied tensor.
        auto* const o = out.mutable_data_ptr<scalar_t>();
        const auto* const hp = h.const_data_ptr<scalar_t>();
        const auto* const sp = s.const_data_ptr<scalar_t>();
        at::parallel_for(0, h.numel(), kGrain, [&](int64_t begin, int64_t end) {
          loops.lerp(o + begin, hp + begin, sp + begin, alpha, end - begin);
        });
      });
}

void BlendBackwardCpu(const Grads& out, const at::Tensor& grad, double alpha) {
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, grad.scalar_type(), "esper_blend_backward", [&] {
        static const auto loops = BestLoops<scalar_t>();
        auto* const gh = out.h.mutable_data_ptr<scalar_t>();
        auto* const gs = out.s.mutable_data_ptr<scalar_t>();
        const auto* const g = grad.const_data_ptr<scalar_t>();
        // What overwrites the gradient comes last in each block.
        const bool h_last = gh == g;
        at::parallel_for(0, grad.numel(), kGrain, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; i += kBlock) {
            const int64_t n = std::min(kBlock, end - i);
            if (!h_last) loops.scale(gh + i, g + i, 1.0 - alpha, n);
            loops.scale(gs + i, g + i, alpha, n);
            if (h_last) loops.scale(gh + i, g + i, 1.0 - alpha, n);
          }
        });
      });
}

}  // namespace esper
