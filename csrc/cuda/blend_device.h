#pragma once

#include <algorithm>
#include <cstdint>

#include <ATen/OpMathType.h>

// The kernels of the blend and how they are launched. Compiled by nvcc for devices, and by a host
// compiler after tests/csrc/cuda_shim.h, which runs them thread by thread.
//
// No __launch_bounds__: with it ptxas holds the kernels for double to 32 registers on sm_80 and
// spills (resources.json has what it uses now).
//
// All arrays hold n elements. Both kernels walk them in packs of N elements with a grid stride;
// the first threads take the elements that do not fill a pack. An element is read before it is
// written, and by one thread only, so an output may be an input: the kernels work in place.
// 64-bit indices: activations of more than 2^31 elements exist.

#ifdef __CUDACC__
#define ESPER_LAUNCH(kernel, blocks, threads, stream, ...) \
  (kernel)<<<(blocks), (threads), 0, (stream)>>>(__VA_ARGS__)
#endif

namespace esper::device {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 8;  // of 256 threads: all that an SM holds
constexpr std::uintptr_t kAccess = 16;  // bytes of the widest load

// N elements that move as one access of N * sizeof(T) bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

// From the nearer end, as torch.lerp does it: exact at both ends. `weight` is alpha, or
// alpha - 1 from the end of s.
template <typename T>
struct Lerp {
  using Op = at::opmath_type<T>;
  Op weight;
  bool from_h;

  explicit Lerp(double alpha) {
    const auto a = static_cast<Op>(alpha);
    from_h = a < Op(0.5);
    weight = from_h ? a : a - Op(1);
  }
  __device__ T operator()(T h, T s) const {
    const Op x = static_cast<Op>(h);
    const Op y = static_cast<Op>(s);
    return static_cast<T>((from_h ? x : y) + weight * (y - x));
  }
};

template <typename T, int N>
__global__ void LerpKernel(T* out, const T* h, const T* s, Lerp<T> lerp, int64_t n) {
  using P = Pack<T, N>;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t packs = n / N;
  for (int64_t i = first; i < packs; i += stride) {
    const P x = reinterpret_cast<const P*>(h)[i];
    const P y = reinterpret_cast<const P*>(s)[i];
    P o;
    for (int k = 0; k < N; ++k) o.v[k] = lerp(x.v[k], y.v[k]);
    reinterpret_cast<P*>(out)[i] = o;
  }
  for (int64_t i = packs * N + first; i < n; i += stride) out[i] = lerp(h[i], s[i]);
}

template <typename T, int N>
__global__ void SplitKernel(T* gh, T* gs, const T* g, at::opmath_type<T> keep,
                            at::opmath_type<T> alpha, int64_t n) {
  using Op = at::opmath_type<T>;
  using P = Pack<T, N>;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t packs = n / N;
  for (int64_t i = first; i < packs; i += stride) {
    const P x = reinterpret_cast<const P*>(g)[i];
    P to_h, to_s;
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

// A view may start in the middle of a pack.
template <typename... Pointers>
bool Aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<std::uintptr_t>(pointers) % kAccess == 0) && ...);
}

inline int Blocks(int64_t work, int multiprocessors) {
  const int64_t needed = (work + kThreads - 1) / kThreads;
  const int64_t full = int64_t{multiprocessors} * kBlocksPerSm;
  return static_cast<int>(std::clamp<int64_t>(needed, 1, full));
}

// out = lerp(h, s, alpha); `out` may be `h` or `s`.
template <typename T, typename Stream>
void LaunchLerp(T* out, const T* h, const T* s, double alpha, int64_t n, int multiprocessors,
                Stream stream) {
  if (n == 0) return;
  constexpr int kWide = kAccess / sizeof(T);
  const Lerp<T> lerp(alpha);
  if (Aligned(out, h, s)) {
    constexpr auto kernel = &LerpKernel<T, kWide>;
    ESPER_LAUNCH(kernel, Blocks(n / kWide, multiprocessors), kThreads, stream, out, h, s, lerp, n);
  } else {
    constexpr auto kernel = &LerpKernel<T, 1>;
    ESPER_LAUNCH(kernel, Blocks(n, multiprocessors), kThreads, stream, out, h, s, lerp, n);
  }
}

// gh = (1 - alpha) * g and gs = alpha * g; either may be `g`.
template <typename T, typename Stream>
void LaunchSplit(T* gh, T* gs, const T* g, double alpha, int64_t n, int multiprocessors,
                 Stream stream) {
  if (n == 0) return;
  using Op = at::opmath_type<T>;
  constexpr int kWide = kAccess / sizeof(T);
  const auto keep = static_cast<Op>(1.0 - alpha);
  const auto a = static_cast<Op>(alpha);
  if (Aligned(gh, gs, g)) {
    constexpr auto kernel = &SplitKernel<T, kWide>;
    ESPER_LAUNCH(kernel, Blocks(n / kWide, multiprocessors), kThreads, stream, gh, gs, g, keep, a,
                 n);
  } else {
    constexpr auto kernel = &SplitKernel<T, 1>;
    ESPER_LAUNCH(kernel, Blocks(n, multiprocessors), kThreads, stream, gh, gs, g, keep, a, n);
  }
}

}  // namespace esper::device
