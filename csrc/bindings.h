#pragma once

#include <pybind11/pybind11.h>

// One function per subject puts its part into esper._C.

namespace esper {

void BindCache(pybind11::module_& m);

}  // namespace esper
