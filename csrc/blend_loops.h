#pragma once

#include <cstdint>

#include <ATen/OpMathType.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

// The loops of the blend over contiguous memory, on one thread, written in ATen's vector types.
// Each source that includes this is compiled for one instruction set and has loops of its own:
// nothing here has external linkage, so that the linker cannot mix them up.

namespace esper {

template <typename T>
struct Loops {
  // out = lerp(h, s, alpha) and out = in * factor over n elements; out may be an input.
  void (*lerp)(T* out, const T* h, const T* s, double alpha, int64_t n);
  void (*scale)(T* out, const T* in, double factor, int64_t n);
};

// Those of blend_avx512.cc, for processors that have AVX-512 F, BW, DQ and VL.
template <typename T>
Loops<T> Avx512Loops();

namespace {

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
}  // namespace esper
