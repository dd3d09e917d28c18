// Compiled for the instruction set of the machine that builds (see CMakeLists.txt); nothing else
// of the extension is, and native.py refuses the library where that set is missing.
#include <algorithm>

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include "blend_kernels.h"

namespace esper {
namespace {

// Below this many elements waking another thread costs more than it saves.
constexpr int64_t kGrain = 32768;
// Elements per block of the backward. The gradient is read from memory once and, for the second
// output, from the first-level cache: 2048 doubles are 16 KiB.
constexpr int64_t kBlock = 2048;

// From the nearer end, as torch.lerp does it: exact at both ends, and the same bits as torch's.
template <typename T>
void Lerp(T* out, const T* h, const T* s, double alpha, int64_t n) {
  using Op = at::opmath_type<T>;
  using V = at::vec::Vectorized<Op>;
  const auto weight = static_cast<Op>(alpha);
  if (weight < Op(0.5)) {
    const V a(weight);
    at::vec::map2<T>([a](V x, V y) { return at::vec::fmadd(a, y - x, x); }, out, h, s, n);
  } else {
    const V a(weight - Op(1));
    at::vec::map2<T>([a](V x, V y) { return at::vec::fmadd(a, y - x, y); }, out, h, s, n);
  }
}

template <typename T>
void Scale(T* out, const T* in, double factor, int64_t n) {
  using Op = at::opmath_type<T>;
  using V = at::vec::Vectorized<Op>;
  const V f(static_cast<Op>(factor));
  at::vec::map<T>([f](V x) { return x * f; }, out, in, n);
}

}  // namespace

void BlendForwardCpu(const at::Tensor& out, const at::Tensor& h, const at::Tensor& s,
                     double alpha) {
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, h.scalar_type(), "esper_blend_forward", [&] {
        auto* const o = out.mutable_data_ptr<scalar_t>();
        const auto* const hp = h.const_data_ptr<scalar_t>();
        const auto* const sp = s.const_data_ptr<scalar_t>();
        at::parallel_for(0, h.numel(), kGrain, [&](int64_t begin, int64_t end) {
          Lerp<scalar_t>(o + begin, hp + begin, sp + begin, alpha, end - begin);
        });
      });
}

void BlendBackwardCpu(const Grads& out, const at::Tensor& grad, double alpha) {
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, grad.scalar_type(), "esper_blend_backward", [&] {
        auto* const gh = out.h.mutable_data_ptr<scalar_t>();
        auto* const gs = out.s.mutable_data_ptr<scalar_t>();
        const auto* const g = grad.const_data_ptr<scalar_t>();
        // What overwrites the gradient comes last in each block.
        const bool h_last = gh == g;
        at::parallel_for(0, grad.numel(), kGrain, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; i += kBlock) {
            const int64_t n = std::min(kBlock, end - i);
            if (!h_last) Scale<scalar_t>(gh + i, g + i, 1.0 - alpha, n);
            Scale<scalar_t>(gs + i, g + i, alpha, n);
            if (h_last) Scale<scalar_t>(gh + i, g + i, 1.0 - alpha, n);
          }
        });
      });
}

}  // namespace esper
