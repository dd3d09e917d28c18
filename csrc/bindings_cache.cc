#include <chrono>
#include <optional>
#include <string>
#include <system_error>
#include <tuple>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "bindings.h"
#include "errors.h"
#include "kernel_cache.h"
#include "sha256.h"
#include "upload.h"

namespace py = pybind11;

namespace esper {
namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;

// The exceptions of esper/errors.py, which is the place where they are documented.
void TranslateErrors(std::exception_ptr pointer) {
  const auto raise = [](const char* name, const std::exception& e) {
    const py::object type = py::module_::import("esper.errors").attr(name);
    PyErr_SetString(type.ptr(), e.what());
  };
  try {
    std::rethrow_exception(std::move(pointer));
  } catch (python_error& e) {
    e.restore();  // Python's own error, from a saved-tensor hook say, as it was
  } catch (const ArtifactCorrupt& e) {
    raise("ArtifactCorrupt", e);
  } catch (const CacheFull& e) {
    raise("CacheFull", e);
  } catch (const std::system_error& e) {
    // With an errno OSError makes itself the subclass that belongs to it.
    const py::tuple arguments = py::make_tuple(e.code().value(), e.what());
    PyErr_SetObject(PyExc_OSError, arguments.ptr());
  }
}

py::dict ToDict(const CacheStatistics& s) {
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

// KernelCache.find, without pybind11's dispatcher: that alone takes longer than the lookup. The
// interpreter has checked that `self` is a KernelCache.
PyObject* Find(PyObject* self, PyObject* digest) try {
  Py_ssize_t size = 0;
  const char* const text = PyUnicode_AsUTF8AndSize(digest, &size);
  if (text == nullptr) return nullptr;  // a TypeError has been set
  auto* const instance = reinterpret_cast<py::detail::instance*>(self);
  auto* const cache = instance->get_value_and_holder().value_ptr<KernelCache>();
  if (cache == nullptr) {
    PyErr_SetString(PyExc_TypeError, "this KernelCache was never initialized");
    return nullptr;
  }
  const KernelCache::Kernel kernel = cache->Find({text, static_cast<size_t>(size)});
  if (!kernel) Py_RETURN_NONE;
  static const auto* const type =
      py::detail::get_type_info(typeid(SeedKernel), /*throw_if_missing=*/true);
  if (PyObject* const known =
          py::detail::find_registered_python_instance(kernel.get(), type).ptr()) {
    return known;
  }
  return py::cast(kernel).release().ptr();
} catch (py::error_already_set& e) {
  e.restore();
  return nullptr;
} catch (const std::exception& e) {  // the caller is C, through which none may pass
  PyErr_SetString(PyExc_RuntimeError, e.what());
  return nullptr;
}

PyMethodDef find_method = {
    "find", &Find, METH_O,
    "find(digest, /)\n--\n\nThe kernel, or None where it is not here. Never waits for a load."};

template <typename T>
void BindPending(py::module_& m, const char* name) {
  py::class_<Pending<T>, std::shared_ptr<Pending<T>>>(m, name)
      .def("done", &Pending<T>::Done)
      .def("wait", &Pending<T>::Wait, NoGil());
}

}  // namespace

void BindCache(py::module_& m) {
  py::class_<Artifact, std::shared_ptr<Artifact>>(
      m, "Artifact", "An artifact in memory, its digest and its zip checked.")
      .def_property_readonly(
          "manifest", [](const Artifact& a) { return py::bytes(a.members.manifest); })
      .def_property_readonly(
          "blueprint", [](const Artifact& a) { return py::bytes(a.members.blueprint); })
      .def_property_readonly("members", [](const Artifact& a) { return a.members.names(); })
      .def_property_readonly("code",
                             [](const Artifact& a) {
                               return py::make_tuple(py::bytes(a.members.code[0]),
                                                     py::bytes(a.members.code[1]));
                             })
      .def_property_readonly("digests", [](const Artifact& a) { return a.digests; });
  m.def(
      "read_artifact",
      [](const std::string& path, const std::string& digest) {
        return std::const_pointer_cast<Artifact>(ReadArtifact(path, digest));
      },
      py::arg("path"), py::arg("digest"), NoGil());

  BindPending<KernelCache::Sealed>(m, "PendingArtifact");
  BindPending<KernelCache::Kernel>(m, "PendingKernel");
  auto cache =
      py::class_<KernelCache>(m, "KernelCache", "Opened kernels by the digest of their artifact.")
          .def(py::init<uint64_t, uint64_t, size_t>(), py::kw_only(), py::arg("max_bytes"),
               py::arg("max_count"), py::arg("threads") = 2)
          .def("read", &KernelCache::Read, py::arg("path"), py::arg("digest"), NoGil())
          .def(
              "open",
              [](KernelCache& self, KernelCache::Sealed artifact,
                 std::vector<std::string> backward_inputs, std::vector<int64_t> gradients,
                 std::string device, std::string dtype, std::vector<std::vector<int64_t>> shapes,
                 std::optional<RawPlan> plan) {
                return self.Open(std::move(artifact),
                                 {std::move(backward_inputs), std::move(gradients),
                                  std::move(device), std::move(dtype), std::move(shapes),
                                  std::move(plan)});
              },
              py::arg("artifact"), py::arg("backward_inputs"), py::arg("gradients"),
              py::arg("device"), py::arg("dtype"),
              py::arg("shapes") = std::vector<std::vector<int64_t>>(),
              py::arg("plan") = std::nullopt, NoGil())
          .def("evict", &KernelCache::Evict, py::arg("digest"), NoGil())
          .def("statistics",
               [](const KernelCache& self) { return ToDict(self.Statistics()); })
          .def(
              "seconds_per_hit",
              [](KernelCache& self, const std::string& digest, int64_t rounds) {
                const auto started = std::chrono::steady_clock::now();
                int64_t found = 0;
                for (int64_t i = 0; i < rounds; ++i) found += self.Find(digest) ? 1 : 0;
                const std::chrono::duration<double> taken =
                    std::chrono::steady_clock::now() - started;
                if (found != rounds) throw py::key_error(digest);
                return taken.count() / static_cast<double>(rounds);
              },
              py::arg("digest"), py::arg("rounds"), NoGil(),
              "How long a hit takes without Python; for benchmarks.");
  cache.attr("find") = py::reinterpret_steal<py::object>(
      PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(cache.ptr()), &find_method));

  py::class_<Upload>(m, "Upload", "Tensors on their way to a device, on a stream of their own.")
      .def(py::init<const std::vector<at::Tensor>&, at::Device>(), py::arg("tensors"),
           py::arg("device"), NoGil())
      .def_property_readonly("tensors", &Upload::tensors)
      .def("join", &Upload::Join, NoGil());

  const auto view = [](const py::bytes& data) {
    const auto text = static_cast<std::string_view>(data);
    return std::pair(reinterpret_cast<const unsigned char*>(text.data()), text.size());
  };
  m.def("sha256", [view](const py::bytes& data) {
    const auto [bytes, size] = view(data);
    return Sha256(bytes, size);
  });
  m.def("sha256_portable", [view](const py::bytes& data) {
    const auto [bytes, size] = view(data);
    return Sha256Portable(bytes, size);
  });

  py::register_exception_translator(&TranslateErrors);
}

}  // namespace esper
