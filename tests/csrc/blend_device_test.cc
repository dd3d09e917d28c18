// Runs the CUDA kernels of the blend on the host, against float64. Prints what was wrong, or how
// many cases ran.
#include "cuda_shim.h"
// After the shim, which gives it its CUDA words.
#include "../../csrc/cuda/blend_device.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

namespace {

using esper::device::kThreads;

int cases = 0;
int wrong = 0;

// Relative error of one rounding to T, with room for the operations before it in T's own type of
// computation (whose errors are far below for the two 16-bit types).
template <typename T>
double Rounding() {
  if constexpr (sizeof(T) == 2) return 0.51 * static_cast<double>(std::numeric_limits<T>::epsilon());
  return 3 * static_cast<double>(std::numeric_limits<T>::epsilon());
}

// n elements at a chosen distance from a 16-byte boundary, between two guards that nobody may
// write to. Exact in size, so that AddressSanitizer sees a read beyond.
template <typename T>
class Array {
 public:
  static constexpr int kGuard = 16;

  Array(int64_t n, int offset) : n_(n), offset_(offset), bytes_(Size() + 16, 0xAB) {
    const auto address = reinterpret_cast<std::uintptr_t>(bytes_.data());
    start_ = bytes_.data() + (16 - address % 16) % 16;
  }

  T* data() { return reinterpret_cast<T*>(start_) + kGuard + offset_; }
  T& operator[](int64_t i) { return data()[i]; }
  bool GuardsHold() {
    const auto* const begin = reinterpret_cast<unsigned char*>(data());
    const auto* const end = reinterpret_cast<unsigned char*>(data() + n_);
    for (const auto* b = bytes_.data(); b != bytes_.data() + bytes_.size(); ++b) {
      if ((b < begin || b >= end) && *b != 0xAB) return false;
    }
    return true;
  }
  void Fill(unsigned seed) {
    for (int64_t i = 0; i < n_; ++i) {
      seed = seed * 1664525u + 1013904223u;
      data()[i] = static_cast<T>(static_cast<float>(seed >> 8) / (1 << 22) - 2.0f);
    }
  }

 private:
  size_t Size() const { return (n_ + 2 * kGuard + offset_) * sizeof(T); }

  int64_t n_;
  int offset_;
  std::vector<unsigned char> bytes_;
  unsigned char* start_;
};

template <typename T>
bool Near(T got, double want, double scale) {
  const double smallest = static_cast<double>(std::numeric_limits<T>::denorm_min());
  return std::abs(static_cast<double>(got) - want) <= Rounding<T>() * scale + 0.51 * smallest;
}

void Report(bool good, const char* what, const char* type, int64_t n, int offset, double alpha) {
  ++cases;
  if (good) return;
  ++wrong;
  std::printf("%s of %s is wrong: n %ld, offset %d, alpha %g\n", what, type,
              static_cast<long>(n), offset, alpha);
}

enum class Place { kApart, kIntoH, kIntoS };

template <typename T>
void CheckLerp(const char* type, int64_t n, int offset, double alpha, Place place, int sms) {
  // Each array at a distance of its own, all zero where the distances are.
  Array<T> h(n, offset), s(n, 2 * offset), apart(n, 3 * offset);
  h.Fill(1);
  s.Fill(2);
  std::vector<double> want(n), scale(n);
  for (int64_t i = 0; i < n; ++i) {
    const auto x = static_cast<double>(h[i]), y = static_cast<double>(s[i]);
    want[i] = x + alpha * (y - x);
    scale[i] = std::abs(x) + std::abs(y);
  }
  Array<T>& out = place == Place::kIntoH ? h : place == Place::kIntoS ? s : apart;
  ShimStream stream;
  esper::device::LaunchLerp(out.data(), h.data(), s.data(), alpha, n, sms, &stream);
  bool good = h.GuardsHold() && s.GuardsHold() && apart.GuardsHold() &&
              stream.launches == (n == 0 ? 0 : 1) && stream.blocks <= sms * 8;
  for (int64_t i = 0; i < n; ++i) good = good && Near(out[i], want[i], scale[i]);
  Report(good, "LerpKernel", type, n, offset, alpha);
}

template <typename T>
void CheckSplit(const char* type, int64_t n, int offset, double alpha, Place place, int sms) {
  Array<T> g(n, offset), apart_h(n, 2 * offset), apart_s(n, 3 * offset);
  g.Fill(3);
  std::vector<double> in(n);
  for (int64_t i = 0; i < n; ++i) in[i] = static_cast<double>(g[i]);
  Array<T>& gh = place == Place::kIntoH ? g : apart_h;
  Array<T>& gs = place == Place::kIntoS ? g : apart_s;
  ShimStream stream;
  esper::device::LaunchSplit(gh.data(), gs.data(), g.data(), alpha, n, sms, &stream);
  bool good = g.GuardsHold() && apart_h.GuardsHold() && apart_s.GuardsHold() &&
              stream.launches == (n == 0 ? 0 : 1);
  for (int64_t i = 0; i < n; ++i) {
    good = good && Near(gh[i], (1 - alpha) * in[i], std::abs(in[i])) &&
           Near(gs[i], alpha * in[i], std::abs(in[i]));
  }
  Report(good, "SplitKernel", type, n, offset, alpha);
}

// What is not a number stays where it is; what is infinite on both sides is not blended to NaN
// by more than the formula itself does.
template <typename T>
void CheckHostile(const char* type) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  const double values[] = {0, -0.0, 1, kInf, -kInf, std::nan("")};
  for (const double x : values) {
    for (const double y : values) {
      Array<T> h(1, 0), s(1, 0), out(1, 0);
      h[0] = static_cast<T>(x);
      s[0] = static_cast<T>(y);
      ShimStream stream;
      esper::device::LaunchLerp(out.data(), h.data(), s.data(), 0.25, 1, 1, &stream);
      const double want = x + 0.25 * (y - x), got = static_cast<double>(out[0]);
      Report(std::isnan(want) ? std::isnan(got) : got == want, "LerpKernel at an end of the range",
             type, 1, 0, 0.25);
    }
  }
}

template <typename T>
void Check(const char* type) {
  constexpr int kWide = 16 / sizeof(T);
  // Around a pack, a block of packs, and a grid that must take more than one stride.
  const int64_t sizes[] = {0, 1, kWide - 1, kWide, kWide + 1, 3 * kWide + 1, 257,
                           kThreads * kWide - 1, kThreads * kWide + 1, 3 * 8 * kThreads * kWide + 7};
  for (const int64_t n : sizes) {
    for (const int offset : {0, 1, kWide - 1, kWide}) {
      for (const double alpha : {0.3, 0.5, 0.9375}) {
        for (const Place place : {Place::kApart, Place::kIntoH, Place::kIntoS}) {
          const int sms = 1;
          CheckLerp<T>(type, n, offset, alpha, place, sms);
          CheckSplit<T>(type, n, offset, alpha, place, sms);
        }
      }
    }
  }
  CheckHostile<T>(type);
}

}  // namespace

int main() {
  Check<float>("float");
  Check<double>("double");
  Check<c10::BFloat16>("bfloat16");
  Check<c10::Half>("half");
  std::printf("%d cases, %d wrong\n", cases, wrong);
  return wrong == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
