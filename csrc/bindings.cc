#include <string>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "blend.h"
#include "errors.h"
#include "kernel_cache.h"
#include "seed_kernel.h"
#include "sha256.h"
#include "slot.h"

namespace py = pybind11;

namespace {

esper::Mode ToMode(int64_t mode) {
  TORCH_CHECK_VALUE(mode >= 0 && mode <= 2, "mode is ", mode,
                    "; it must be 0 (TRAINING), 1 (GRAFTING) or 2 (FULL)");
  return static_cast<esper::Mode>(mode);
}

// The exceptions of esper/errors.py, which is the place where they are documented.
void TranslateErrors(std::exception_ptr pointer) {
  const auto raise = [](const char* name, const std::exception& e) {
    const py::object type = py::module_::import("esper.errors").attr(name);
    PyErr_SetString(type.ptr(), e.what());
  };
  try {
    std::rethrow_exception(std::move(pointer));
  } catch (const esper::ArtifactCorrupt& e) {
    raise("ArtifactCorrupt", e);
  } catch (const esper::ArtifactMismatch& e) {
    raise("ArtifactMismatch", e);
  } catch (const esper::CacheFull& e) {
    raise("CacheFull", e);
  } catch (const std::system_error& e) {
    PyErr_SetString(PyExc_OSError, e.what());
  }
}

py::dict ToDict(const esper::CacheStatistics& s) {
  py::dict d;
  d["hits"] = s.hits;
  d["misses"] = s.misses;
  d["loads"] = s.loads;
  d["failures"] = s.failures;
  d["evictions"] = s.evictions;
  d["resident_bytes"] = s.resident_bytes;
  d["resident_count"] = s.resident_count;
  d["load_seconds"] = static_cast<double>(s.load_nanoseconds) * 1e-9;
  d["longest_load_seconds"] = static_cast<double>(s.longest_load_nanoseconds) * 1e-9;
  return d;
}

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
                       const std::string& dtype) {
             py::gil_scoped_release no_gil;
             return c10::make_intrusive<esper::SeedKernel>(
                 forward_so, backward_so, backward_inputs, std::move(gradients), device, dtype);
           }),
           py::arg("forward_so"), py::arg("backward_so"), py::arg("backward_inputs"),
           py::arg("gradients"), py::arg("device") = "cpu", py::arg("dtype") = "float32")
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

  using esper::Expected;
  py::class_<Expected>(m, "Expected", "What the library says of an artifact.")
      .def(py::init<std::string, std::string, std::string, std::string, std::string,
                    std::vector<std::string>, std::vector<int64_t>, std::string, std::string>(),
           py::kw_only(), py::arg("path"), py::arg("digest"), py::arg("kernel_id"),
           py::arg("torch"), py::arg("isa"), py::arg("backward_inputs"), py::arg("gradients"),
           py::arg("device"), py::arg("dtype"));

  using esper::KernelCache;
  py::class_<KernelCache::Pending, std::shared_ptr<KernelCache::Pending>>(m, "PendingKernel")
      .def("done", &KernelCache::Pending::Done)
      .def("wait", &KernelCache::Pending::Wait, NoGil());
  py::class_<KernelCache>(m, "KernelCache", "Opened kernels by the digest of their artifact.")
      .def(py::init<uint64_t, uint64_t, size_t>(), py::kw_only(), py::arg("max_bytes"),
           py::arg("max_count"), py::arg("threads"))
      .def("find", &KernelCache::Find, py::arg("digest"))
      .def("load", &KernelCache::Load, py::arg("expected"), NoGil())
      .def("prefetch", &KernelCache::Prefetch, py::arg("expected"), NoGil())
      .def("evict", &KernelCache::Evict, py::arg("digest"), NoGil())
      .def("statistics", [](const KernelCache& cache) { return ToDict(cache.Statistics()); });

  using esper::SlotSeed;
  py::class_<SlotSeed, std::shared_ptr<SlotSeed>>(m, "SlotSeed", "One seed behind a slot.")
      .def(py::init<c10::intrusive_ptr<esper::SeedKernel>, esper::Tensors>(), py::arg("kernel"),
           py::arg("params"))
      .def("set", [](SlotSeed& seed, double alpha, int64_t mode) {
             const esper::Mode value = ToMode(mode);
             seed.Set(alpha, &value);
           }, py::arg("alpha"), py::arg("mode"))
      .def("off", [](SlotSeed& seed) { seed.Set(0.0, nullptr); })
      .def_property_readonly("failure", &SlotSeed::failure)
      .def("ask_for_drift", &SlotSeed::AskForDrift)
      .def("take_drift", [](SlotSeed& seed) -> py::object {
        const at::Tensor drift = seed.TakeDrift();
        return drift.defined() ? py::cast(drift) : py::none();
      });
  py::class_<esper::Slot>(m, "Slot", "A place in a compiled host behind which seeds come and go.")
      .def(py::init<>())
      .def_property_readonly("number", &esper::Slot::number)
      .def("set_seeds", &esper::Slot::SetSeeds, py::arg("seeds"), NoGil());

  const auto view = [](const py::bytes& data) {
    const auto text = static_cast<std::string_view>(data);
    return std::pair(reinterpret_cast<const unsigned char*>(text.data()), text.size());
  };
  m.def("sha256", [view](const py::bytes& data) {
    const auto [bytes, size] = view(data);
    return esper::Sha256(bytes, size);
  });
  m.def("sha256_portable", [view](const py::bytes& data) {
    const auto [bytes, size] = view(data);
    return esper::Sha256Portable(bytes, size);
  });
  m.def("parse_artifact", [](const py::bytes& data) {
    const auto members = esper::ParseArtifact(static_cast<std::string_view>(data));
    return std::tuple(py::bytes(members.manifest), py::bytes(members.blueprint),
                      py::bytes(members.forward), py::bytes(members.backward));
  });

  py::register_exception_translator(&TranslateErrors);

  m.def("blend", &esper::Blend, py::arg("h"), py::arg("s"), py::arg("alpha"), py::arg("reuse") = false,
        NoGil(), "h + alpha * (s - h) in one pass, with autograd.");
#ifdef ESPER_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
}
