#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <c10/core/ScalarType.h>
#include <c10/core/Stream.h>

#include "thread_annotations.h"

namespace esper {

struct FailureSink;  // seed_node.h

// What a call does to output and gradients. The values are part of the Python interface.
enum class Mode : int64_t {
  kTraining = 0,  // out is h; parameters learn as at alpha = 1; g_h = g_out
  kGrafting = 1,  // out is the blend; g_h = (1 - alpha) * g_out: the seed's input is detached
  kFull = 2,      // out is the blend; every gradient comes from the compiled backward
};

// One input of the compiled backward.
struct Source {
  enum class Kind { kForwardInput, kForwardOutput, kGradOutput };

  // Reads "in:I", "out:K" or "grad". Throws c10::ValueError on anything else.
  static Source Parse(const std::string& text, size_t forward_inputs);

  Kind kind;
  size_t index;  // unused for kGradOutput
};

// The 0-dim float32 tensors in which alpha is handed to compiled code.
//
// Invariant: a tensor once handed out is never written to. Nodes of an autograd graph keep it
// until their backward, so a new value gets a new tensor. TRAINING always asks for 1, so that
// value has its own place and does not evict the schedule's. A tensor is used on the stream that
// filled it and on no other, which would not wait for that. What is made while a stream is captured
// lies in the memory of that graph, which fills it at each replay: it is the graph's alone.
//
// Thread-safe. Nobody waits for the mutex: who does not get it at once makes a tensor for itself.
// So a child that inherits it held, for good, is none the worse.
class AlphaCache {
 public:
  at::Tensor Get(double alpha, at::Device device) ESPER_EXCLUDES(mutex_);

 private:
  struct Held {
    at::Tensor tensor;                  // undefined until first asked for
    std::optional<c10::Stream> stream;  // none on a CPU
    double value = 0;
  };

  Mutex mutex_;
  Held one_ ESPER_GUARDED_BY(mutex_);
  Held current_ ESPER_GUARDED_BY(mutex_);
};

// Compiled code, forward or backward, below autograd. Thread-safe.
class Half {
 public:
  virtual ~Half() = default;
  // `inputs` are contiguous and on one device, which is the current one. Results are new tensors
  // every time, each of memory of its own. The caller holds the inputs too, see NoFork.
  virtual std::vector<at::Tensor> Run(std::vector<at::Tensor> inputs) = 0;
};

// A forward and a backward compiled ahead of time, run as one node of the autograd graph.
//
//   forward:  [h, alpha, *params]      -> [out, *saved]
//   backward: as `backward_inputs` says -> gradients, picked by `gradients`
//
// `gradients` has one entry for h and one for each parameter: the index of its gradient among
// the outputs of the backward, or -1 for none.
//
// Invariants: everything but the alpha cache is fixed at construction. The graph's nodes hold a
// reference to the kernel they were made by, so its machine code stays mapped until the last
// backward that may need it has run, whoever else has let go of the kernel.
//
// Thread-safe: any thread may call Run, and backward runs on whatever thread autograd chooses.
// Calls on one kernel of libraries wait for one another in torch's runner, which keeps one model.
// No method may be called with the GIL held: kernels run for long.
class SeedKernel : public torch::CustomClassHolder {
 public:
  // Opens both libraries. `device` is "cpu", "cuda" (the current one) or "cuda:N", and the only
  // one that the kernel then runs on; `dtype` is the element type of
  // h and the parameters: "float32", "float64", "bfloat16" or "float16". `shapes` are the sizes of
  // h and of each parameter, -1 where any will do; where it is empty they are not checked.
  // Throws c10::ValueError for a convention that cannot hold, c10::Error for a library that
  // cannot be opened.
  SeedKernel(
      const std::string& forward_so,
      const std::string& backward_so,
      const std::vector<std::string>& backward_inputs,
      std::vector<int64_t> gradients,
      const std::string& device,
      const std::string& dtype,
      std::vector<std::vector<int64_t>> shapes = {});
  // Of halves that are open already.
  SeedKernel(
      std::unique_ptr<Half> forward,
      std::unique_ptr<Half> backward,
      const std::vector<std::string>& backward_inputs,
      std::vector<int64_t> gradients,
      const std::string& device,
      const std::string& dtype,
      std::vector<std::vector<int64_t>> shapes);

  // alpha must be within [0, 1]; it is ignored in TRAINING. At alpha = 0, and wherever nothing
  // has to be computed, the very tensor `h` is returned. Under autocast `h` may be of another
  // floating type than the kernel: it is converted, and the result converted back.
  // Failures of its backward go to `sink`, if there is one; see ApplySeed.
  at::Tensor Run(const at::Tensor& h, const std::vector<at::Tensor>& params, double alpha,
                 Mode mode, std::shared_ptr<FailureSink> sink = nullptr);

  // Throws c10::ValueError where a call with these arguments cannot be right, and CallerError
  // where it could not be with any kernel for this site: on another device, or transformed.
  void CheckInputs(const at::Tensor& h, const std::vector<at::Tensor>& params, double alpha,
                   Mode mode) const;

  // The two halves, below autograd. `inputs` are consumed.
  std::vector<at::Tensor> RunForward(std::vector<at::Tensor> inputs);
  std::vector<at::Tensor> RunBackward(std::vector<at::Tensor> inputs);

  // What came with the code, where it came from an artifact; set before anyone else sees it.
  struct Papers {
    std::string manifest;
    std::string blueprint;
    uint64_t code_bytes = 0;
  };
  Papers papers;

  const std::vector<Source>& sources() const { return sources_; }
  const std::vector<int64_t>& gradients() const { return gradients_; }
  at::ScalarType dtype() const { return dtype_; }
  AlphaCache& alphas() { return alphas_; }

 private:
  // Everything but the halves.
  SeedKernel(
      const std::vector<std::string>& backward_inputs,
      std::vector<int64_t> gradients,
      const std::string& device,
      const std::string& dtype,
      std::vector<std::vector<int64_t>> shapes);

  const std::vector<int64_t> gradients_;
  const at::Device device_;
  const at::ScalarType dtype_;
  const std::vector<std::vector<int64_t>> shapes_;
  std::vector<Source> sources_;
  size_t forward_outputs_ = 1;   // at least this many are needed
  size_t backward_outputs_ = 0;  // at least this many are needed
  std::unique_ptr<Half> forward_;
  std::unique_ptr<Half> backward_;
  AlphaCache alphas_;
};

}  // namespace esper
