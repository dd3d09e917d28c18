#pragma once

#include <vector>

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace esper {

// The call is wrong, whatever the kernel is. It reaches the caller and is never held against the
// kernel.
struct CallerError : c10::ValueError {
  using c10::ValueError::ValueError;
};

template <typename... What>
void CheckCall(bool right, const What&... what) {
  if (!right) throw CallerError({__func__, __FILE__, __LINE__}, c10::str(what...));
}

// Whether the memory of the tensor holds its values, and nobody needs to know what is done to it:
// neither a subclass in Python, nor traced or transformed, nor a lazy negation or zero.
bool IsPlain(const at::Tensor& tensor);

// Whether a transform of torch.func has wrapped the tensor.
bool IsWrapped(const at::Tensor& tensor);

[[noreturn]] void RefuseTransformed();

// Throws CallerError where what is computed from these is to be recorded or transformed by other
// means than autograd's backward: under vmap or another transform of torch.func, in forward mode,
// while it is traced, with fake tensors or subclasses. Compiled code would compute past all of
// them. What is lazily negated or zero passes, see Materialized; so does a mode that only looks on.
void CheckUntransformed(const at::Tensor& h, const std::vector<at::Tensor>& params);

// The same values in memory as compiled code reads it: in plain order, negated where they are. The
// tensor itself where it is so already. To be called below autograd.
at::Tensor Materialized(const at::Tensor& tensor);

}  // namespace esper
