#pragma once

#include <ATen/core/Tensor.h>

namespace esper {

// The blend of h and s, h + alpha * (s - h), in one pass, with a backward that writes both
// gradients in one pass.
//
// h and s: floating point, of one shape, element type and device; alpha within [0, 1].
// At alpha = 0 and 1 the very tensor h or s is returned: what is blended out has no influence,
// not even where it is inf or NaN, and gets no gradient. bfloat16 and float16 are computed in
// float32. Tensors that fill their memory without gaps and in the same order (contiguous,
// channels-last, transposed alike) are blended as they lie. All others (expanded, overlapping,
// of unlike strides, lazily negated, under vmap, forward-mode or tracing) go through torch's own
// operators, which give the same values.
//
// With `reuse` the caller has no more use for s, and the result may be written into its memory;
// s itself is then returned. That is done where nobody else can see the memory, and not where
//   - a view, a detached alias, h, or a saved tensor of s's producer shares it,
//   - s is a leaf that requires a gradient, or has a history that no_grad() would leave untrue,
//   - s is an inference tensor outside of inference mode.
// A tensor that saved s itself as its input (it was a second use of s) is not seen here; as for
// any change in place, autograd says so in its backward.
//
// Thread-safe; call without the GIL.
at::Tensor Blend(const at::Tensor& h, const at::Tensor& s, double alpha, bool reuse);

}  // namespace esper
