#include "linker.h"

#include <new>
#include <shared_mutex>
#include <stdexcept>

#include <pthread.h>

namespace esper {
namespace {

std::shared_mutex& TheMutex() {
  static auto* const the = new std::shared_mutex;  // never destroyed: fork may come late
  return *the;
}

int Install() {
  // In a child the parent's threads, which may be waiting for it, are still counted in it.
  return pthread_atfork([] { TheMutex().lock(); }, [] { TheMutex().unlock(); },
                        [] { new (&TheMutex()) std::shared_mutex; });
}

}  // namespace

LinkerLock::LinkerLock() {
  static const int installed = Install();
  if (installed != 0) throw std::runtime_error("pthread_atfork failed: no memory is left");
  TheMutex().lock_shared();
}

LinkerLock::~LinkerLock() { TheMutex().unlock_shared(); }

}  // namespace esper
