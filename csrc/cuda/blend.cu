#include <algorithm>
#include <cstdint>

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include "../blend_kernels.h"

namespace esper {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 8;

// N elements that move as one access of N * sizeof(T) bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

// Both kernels walk the array in packs with a grid stride; the last thread's neighbours take the
// elements that do not fill a pack. 64-bit indices: activations of 2^31 elements exist.
template <typename T, int N>
__global__ void LerpKernel(T* out, const T* h, const T* s,
                           at::opmath_type<T> alpha, int64_t n) {
  using Op = at::opmath_type<T>;
  using P = Pack<T, N>;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t packs = n / N;
  for (int64_t i = first; i < packs; i += stride) {
    const P x = reinterpret_cast<const P*>(h)[i];
    const P y = reinterpret_cast<const P*>(s)[i];
    P o;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const Op a = static_cast<Op>(x.v[k]);
      o.v[k] = static_cast<T>(a + alpha * (static_cast<Op>(y.v[k]) - a));
    }
    reinterpret_cast<P*>(out)[i] = o;
  }
  for (int64_t i = packs * N + first; i < n; i += stride) {
    const Op a = static_cast<Op>(h[i]);
    out[i] = static_cast<T>(a + alpha * (static_cast<Op>(s[i]) - a));
  }
}

template <typename T, int N>
__global__ void SplitKernel(T* gh, T* gs, const T* g,
                            at::opmath_type<T> keep, at::opmath_type<T> alpha, int64_t n) {
  using Op = at::opmath_type<T>;
  using P = Pack<T, N>;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t packs = n / N;
  for (int64_t i = first; i < packs; i += stride) {
    const P x = reinterpret_cast<const P*>(g)[i];
    P to_h, to_s;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const Op a = static_cast<Op>(x.v[k]);
      to_h.v[k] = static_cast<T>(a * keep);
      to_s.v[k] = static_cast<T>(a * alpha);
    }
    reinterpret_cast<P*>(gh)[i] = to_h;
    reinterpret_cast<P*>(gs)[i] = to_s;
  }
  for (int64_t i = packs * N + first; i < n; i += stride) {
    const Op a = static_cast<Op>(g[i]);
    gh[i] = static_cast<T>(a * keep);
    gs[i] = static_cast<T>(a * alpha);
  }
}

bool Aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

int Grid(int64_t work) {
  const int64_t blocks = (work + kThreads - 1) / kThreads;
  const int64_t full = at::cuda::getCurrentDeviceProperties()->multiProcessorCount * kBlocksPerSm;
  return static_cast<int>(std::max<int64_t>(1, std::min(blocks, full)));
}

}  // namespace

void BlendForwardCuda(const at::Tensor& out, const at::Tensor& h, const at::Tensor& s,
                      double alpha) {
  const c10::cuda::CUDAGuard on_device(h.device());
  const int64_t n = h.numel();
  if (n == 0) return;
  const auto stream = at::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, h.scalar_type(), "esper_blend_forward", [&] {
        constexpr int kWide = 16 / sizeof(scalar_t);
        auto* const o = out.mutable_data_ptr<scalar_t>();
        const auto* const hp = h.const_data_ptr<scalar_t>();
        const auto* const sp = s.const_data_ptr<scalar_t>();
        const auto a = static_cast<at::opmath_type<scalar_t>>(alpha);
        if (Aligned(o) && Aligned(hp) && Aligned(sp)) {
          LerpKernel<scalar_t, kWide>
              <<<Grid(n / kWide), kThreads, 0, stream>>>(o, hp, sp, a, n);
        } else {  // a view that starts in the middle of a pack
          LerpKernel<scalar_t, 1><<<Grid(n), kThreads, 0, stream>>>(o, hp, sp, a, n);
        }
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      });
}

void BlendBackwardCuda(const Grads& out, const at::Tensor& grad, double alpha) {
  const c10::cuda::CUDAGuard on_device(grad.device());
  const int64_t n = grad.numel();
  if (n == 0) return;
  const auto stream = at::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, grad.scalar_type(), "esper_blend_backward", [&] {
        constexpr int kWide = 16 / sizeof(scalar_t);
        using Op = at::opmath_type<scalar_t>;
        auto* const gh = out.h.mutable_data_ptr<scalar_t>();
        auto* const gs = out.s.mutable_data_ptr<scalar_t>();
        const auto* const g = grad.const_data_ptr<scalar_t>();
        const auto keep = static_cast<Op>(1.0 - alpha);
        const auto a = static_cast<Op>(alpha);
        if (Aligned(gh) && Aligned(gs) && Aligned(g)) {
          SplitKernel<scalar_t, kWide>
              <<<Grid(n / kWide), kThreads, 0, stream>>>(gh, gs, g, keep, a, n);
        } else {
          SplitKernel<scalar_t, 1><<<Grid(n), kThreads, 0, stream>>>(gh, gs, g, keep, a, n);
        }
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      });
}

}  // namespace esper
