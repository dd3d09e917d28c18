#pragma once

#include <ATen/core/Tensor.h>

namespace esper {

// out = h + alpha * (s - h) in one pass, with a backward that writes both gradients in one pass.
//
// h and s: floating point, of one shape, element type and device; alpha within [0, 1].
// At alpha = 0 and 1 the very tensor h or s is returned: what is blended out has no influence,
// not even where it is inf or NaN, and gets no gradient. bfloat16 and float16 are computed in
// float32. Inputs that are not contiguous go through torch's own operators.
//
// With `reuse` the caller has no more use for s: where autograd allows, the result is written
// into its memory and s is returned. A producer of s that saved its output for its own backward
// will say so there, as for any change in place.
//
// Thread-safe; call without the GIL.
at::Tensor Blend(const at::Tensor& h, const at::Tensor& s, double alpha, bool reuse);

}  // namespace esper
