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

// How many locks this thread holds. A library that forks while it is opened does so below one.
thread_local int held = 0;

void Before() {
  if (held == 0) TheMutex().lock();
}

void InParent() {
  if (held == 0) TheMutex().unlock();
}

// In a child the parent's threads, which may be waiting for it, are still counted in it.
void InChild() {
  new (&TheMutex()) std::shared_mutex;
  for (int i = 0; i < held; ++i) TheMutex().lock_shared();
}

int Install() { return pthread_atfork(&Before, &InParent, &InChild); }

}  // namespace

LinkerLock::LinkerLock() {
  static const int installed = Install();
  if (installed != 0) throw std::runtime_error("pthread_atfork failed: no memory is left");
  TheMutex().lock_shared();
  ++held;
}

LinkerLock::~LinkerLock() {
  --held;
  TheMutex().unlock_shared();
}

}  // namespace esper
