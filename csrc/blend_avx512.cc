// Compiled with AVX-512 and called only where the processor has it (see blend_cpu.cc). Linked
// last, so that inline functions of headers are taken from sources for lesser processors.
#include "blend_loops.h"

namespace esper {

template <typename T>
Loops<T> Avx512Loops() {
  return {&Lerp<T>, &Scale<T>};
}

template Loops<float> Avx512Loops();
template Loops<double> Avx512Loops();
template Loops<at::BFloat16> Avx512Loops();
template Loops<at::Half> Avx512Loops();

}  // namespace esper
