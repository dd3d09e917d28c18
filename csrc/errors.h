#pragma once

#include <stdexcept>

// What goes wrong with artifacts. The bindings turn it into the class of the same name in
// esper/errors.py.

namespace esper {

// Damaged, foreign, or not what its digest or its manifest says.
struct ArtifactCorrupt : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace esper
