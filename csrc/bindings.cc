#include <string>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "bindings.h"
#include "blend.h"
#include "launch_plan.h"
#include "seed_kernel.h"
#include "slot.h"

namespace py = pybind11;

namespace {

esper::Mode ToMode(int64_t mode) {
  TORCH_CHECK_VALUE(mode >= 0 && mode <= 2, "mode is ", mode,
                    "; it must be 0 (TRAINING), 1 (GRAFTING) or 2 (FULL)");
  return static_cast<esper::Mode>(mode);
}

// Hands launches to a function of Python, so that plans can be followed where there is no GPU:
// launch(kernel's index, grid, values).
class PythonLauncher : public esper::Launcher {
 public:
  explicit PythonLauncher(py::function launch) : launch_(std::move(launch)) {}
  ~PythonLauncher() override {
    py::gil_scoped_acquire gil;
    launch_ = py::function();
  }
  void Launch(const esper::CubinKernel&, const esper::LaunchCall& call) override {
    py::gil_scoped_acquire gil;
    launch_(call.kernel, call.grid, call.values);
  }

 private:
  py::function launch_;
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native part of esper. Use it through esper.kasmina.native and .blend, which "
            "check that this library was built for the torch that is running.";
  using NoGil = py::call_guard<py::gil_scoped_release>;

  py::class_<esper::SeedKernel, c10::intrusive_ptr<esper::SeedKernel>>(
      m, "SeedKernel", "A kernel compiled ahead of time, run as one node of the autograd graph.")
      .def(py::init([](const std::string& forward_so, const std::string& backward_so,
                       const std::vector<std::string>& backward_inputs,
                       std::vector<int64_t> gradients, const std::string& device,
                       const std::string& dtype,
                       std::vector<std::vector<int64_t>> shapes) {
             py::gil_scoped_release no_gil;
             return c10::make_intrusive<esper::SeedKernel>(
                 forward_so, backward_so, backward_inputs, std::move(gradients), device, dtype,
                 std::move(shapes));
           }),
           py::arg("forward_so"), py::arg("backward_so"), py::arg("backward_inputs"),
           py::arg("gradients"), py::arg("device") = "cpu", py::arg("dtype") = "float32",
           py::arg("shapes") = std::vector<std::vector<int64_t>>())
      .def_static(
          "followed",
          [](const esper::RawPlan& raw, py::function launch,
             const std::vector<std::string>& backward_inputs, std::vector<int64_t> gradients,
             const std::string& device, const std::string& dtype,
             std::vector<std::vector<int64_t>> shapes) {
            const auto plan = std::make_shared<const esper::LaunchPlan>(raw);
            return esper::OpenPlan(plan, std::make_shared<PythonLauncher>(std::move(launch)),
                                   backward_inputs, std::move(gradients), device, dtype,
                                   std::move(shapes));
          },
          py::arg("plan"), py::arg("launch"), py::arg("backward_inputs"), py::arg("gradients"),
          py::arg("device"), py::arg("dtype"),
          py::arg("shapes") = std::vector<std::vector<int64_t>>(),
          "A kernel of a launch plan whose launches are handed to `launch(kernel, grid, values)`.")
      .def(
          "__call__",
          [](esper::SeedKernel& self, const at::Tensor& h, const std::vector<at::Tensor>& params,
             double alpha, int64_t mode) { return self.Run(h, params, alpha, ToMode(mode)); },
          py::arg("h"), py::arg("params"), py::arg("alpha"), py::arg("mode"), NoGil())
      .def_property_readonly("manifest",
                             [](const esper::SeedKernel& k) { return py::bytes(k.papers.manifest); })
      .def_property_readonly("blueprint", [](const esper::SeedKernel& k) {
        return py::bytes(k.papers.blueprint);
      });

  esper::BindCache(m);

  using esper::RunningSeed;
  py::class_<RunningSeed, std::shared_ptr<RunningSeed>>(
      m, "RunningSeed", "One seed as it runs; the contract is in esper/kasmina/runner.py.")
      .def(py::init<c10::intrusive_ptr<esper::SeedKernel>, esper::Tensors>(), py::arg("kernel"),
           py::arg("params"))
      .def("__call__", &RunningSeed::Call, py::arg("h"), NoGil())
      .def_property_readonly("kernel", [](const RunningSeed& seed) { return seed.kernel; })
      .def("set", [](RunningSeed& seed, double alpha, int64_t mode) {
             seed.Set(alpha, ToMode(mode));
           }, py::arg("alpha"), py::arg("mode"))
      .def("off", &RunningSeed::Off)
      .def_property_readonly("failure", &RunningSeed::failure)
      .def("ask_for_drift", &RunningSeed::AskForDrift)
      .def("take_drift", [](RunningSeed& seed) -> py::object {
        const at::Tensor drift = seed.TakeDrift();
        return drift.defined() ? py::cast(drift) : py::none();
      });
  py::class_<esper::Slot>(m, "Slot", "A place in a compiled host behind which seeds come and go.")
      .def(py::init<>())
      .def_property_readonly("number", &esper::Slot::number)
      .def("set_seeds", &esper::Slot::SetSeeds, py::arg("seeds"), NoGil());

  m.def("blend", &esper::Blend, py::arg("h"), py::arg("s"), py::arg("alpha"), py::arg("reuse") = false,
        NoGil(), "h + alpha * (s - h) in one pass, with autograd.");
#ifdef ESPER_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
}
