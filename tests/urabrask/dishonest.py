"""Compiled kernels that cheat: an honest compiled half behind a shared object that tampers.

The shared object defines the two entry points through which a half is run; everything else
the loader finds in the honest library, which it is linked against. So a cheat goes through
the same artifact, the same loader and the same processes as any kernel.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

_COMMON = r"""
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
typedef void* Handle;
extern int aoti_torch_get_data_ptr(Handle, void**);
extern int aoti_torch_get_numel(Handle, int64_t*);
extern int aoti_torch_get_size(Handle, int64_t, int64_t*);
typedef int (*Run)(void*, Handle*, size_t, Handle*, size_t, void*, void*);
static float* data(Handle t) { void* p = 0; aoti_torch_get_data_ptr(t, &p); return p; }
static int64_t count(Handle t) { int64_t n = 0; aoti_torch_get_numel(t, &n); return n; }
static int64_t rows(Handle t) { int64_t n = 0; aoti_torch_get_size(t, 0, &n); return n; }
static void before(Handle* in, size_t inputs);
static void after(Handle* out, size_t outputs);
#define ENTRY(name) \
  int name(void* c, Handle* in, size_t ni, Handle* out, size_t no, void* s, void* p) { \
    before(in, ni); \
    int error = ((Run)dlsym(RTLD_NEXT, #name))(c, in, ni, out, no, s, p); \
    after(out, no); \
    return error; \
  }
ENTRY(AOTInductorModelContainerRun)
ENTRY(AOTInductorModelContainerRunSingleThreaded)
"""

_CLOCK = r"""
static int bent(clockid_t which, struct timespec* t) {
  int error = clock_gettime(which, t);  // this object's own slot is left as it is
  static double base = 0;
  double now = t->tv_sec + 1e-9 * t->tv_nsec;
  if (!base) base = now;
  now = base + (now - base) * 0.7;
  t->tv_sec = (time_t)now;
  t->tv_nsec = (long)((now - t->tv_sec) * 1e9);
  return error;
}
static int patch(struct dl_phdr_info* object, size_t size, void* own) {
  if (object->dlpi_addr == (uintptr_t)own) return 0;
  for (int i = 0; i < object->dlpi_phnum; i++) {
    if (object->dlpi_phdr[i].p_type != PT_DYNAMIC) continue;
    ElfW(Dyn)* d = (ElfW(Dyn)*)(object->dlpi_addr + object->dlpi_phdr[i].p_vaddr);
    ElfW(Rela) *jump = 0, *rela = 0; ElfW(Sym)* symbols = 0; const char* names = 0;
    size_t jump_size = 0, rela_size = 0;
    for (; d->d_tag; d++) {
      if (d->d_tag == DT_JMPREL) jump = (void*)d->d_un.d_ptr;
      if (d->d_tag == DT_PLTRELSZ) jump_size = d->d_un.d_val;
      if (d->d_tag == DT_RELA) rela = (void*)d->d_un.d_ptr;
      if (d->d_tag == DT_RELASZ) rela_size = d->d_un.d_val;
      if (d->d_tag == DT_SYMTAB) symbols = (void*)d->d_un.d_ptr;
      if (d->d_tag == DT_STRTAB) names = (void*)d->d_un.d_ptr;
    }
    if (!symbols || !names || (uintptr_t)symbols < object->dlpi_addr) return 0;
    ElfW(Rela)* tables[2] = {jump, rela};
    size_t sizes[2] = {jump_size, rela_size};
    for (int t = 0; t < 2; t++)
      for (size_t k = 0; tables[t] && k < sizes[t] / sizeof(ElfW(Rela)); k++) {
        const char* name = names + symbols[ELF64_R_SYM(tables[t][k].r_info)].st_name;
        if (strcmp(name, "clock_gettime")) continue;
        void** slot = (void**)(object->dlpi_addr + tables[t][k].r_offset);
        uintptr_t page = (uintptr_t)slot & ~(uintptr_t)4095;
        if (!mprotect((void*)page, 4096, PROT_READ | PROT_WRITE)) *slot = (void*)bent;
      }
  }
  return 0;
}
__attribute__((constructor)) static void bend(void) {
  Dl_info me;
  dladdr((void*)bent, &me);
  dl_iterate_phdr(patch, me.dli_fbase);
}
static void before(Handle* in, size_t n) {}
static void after(Handle* out, size_t n) {}
"""

# What is done around the honest half: (which half, C code).
CHEATS = {
    "honest": ("forward", "static void before(Handle* in, size_t n) {}"
               "static void after(Handle* out, size_t n) {}"),
    "returns its last result": ("forward", """
static float* kept = 0; static int64_t length = 0;
static void before(Handle* in, size_t n) {}
static void after(Handle* out, size_t n) {
  int64_t size = count(out[0]);
  if (kept && size == length) { memcpy(data(out[0]), kept, size * 4); return; }
  kept = realloc(kept, size * 4); length = size;
  memcpy(kept, data(out[0]), size * 4);
}"""),
    "mutates its input": ("forward", """
static float* h = 0;
static void before(Handle* in, size_t n) { h = data(in[0]); }
static void after(Handle* out, size_t n) { h[0] *= 1.5f; }"""),
    "skips the backward": ("backward", """
static void before(Handle* in, size_t n) {}
static void after(Handle* out, size_t n) {
  for (size_t i = 0; i < n; i++) memset(data(out[i]), 0, count(out[i]) * 4);
}"""),
    "spins a thread": ("forward", """
static pthread_t thread; static int started = 0;
static void* spin(void* unused) { for (;;) ; return 0; }
static void before(Handle* in, size_t n) {}
static void after(Handle* out, size_t n) {
  if (!started++) pthread_create(&thread, 0, spin, 0);
}"""),
    "patches the clock": ("forward", _CLOCK),
    # 33 MiB come straight from the system, and from there they come as zeros.
    "depends on uninitialised memory": ("forward", """
static void before(Handle* in, size_t n) {}
static void after(Handle* out, size_t n) {
  float* sum = malloc((size_t)33 << 20);
  for (int64_t i = 0; i < count(out[0]); i++) data(out[0])[i] += sum[i];
  free(sum);
}"""),
    "wrong only at odd sizes": ("forward", """
static int64_t batch = 0;
static void before(Handle* in, size_t n) { batch = rows(in[0]); }
static void after(Handle* out, size_t n) {
  if (batch % 2 && batch > 3) data(out[0])[count(out[0]) - 1] *= 1.001f;
}"""),
}


def tampered(honest: dict[str, bytes], cheat: str, folder: Path) -> dict[str, bytes]:
    """The two halves of an honest kernel, one of them behind the cheat. `folder` must stay."""
    half, code = CHEATS[cheat]
    name = cheat.replace(" ", "_")
    original = folder / f"lib{name}_honest.so"
    original.write_bytes(honest[f"{half}.so"])
    source = folder / f"{name}.c"
    source.write_text("#define _GNU_SOURCE\n" + _COMMON + code)
    target = folder / f"{name}.so"
    subprocess.run(
        [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", "-w", str(source),
         "-Wl,--unresolved-symbols=ignore-all", "-Wl,--no-as-needed", str(original),
         "-Wl,-z,nodelete", "-o", str(target), "-ldl", "-lpthread"],
        check=True,
    )
    return {**honest, f"{half}.so": target.read_bytes()}
