#include "fork.h"

#include <new>
#include <stdexcept>

#include <pthread.h>

namespace esper {
namespace {

SharedMutex& TheMutex() {
  static auto* const the = new SharedMutex;  // never destroyed: fork may come late
  return *the;
}

// How many live on this thread; the first one holds the mutex for all of them.
thread_local int held = 0;

// The analysis cannot follow a lock from one function to another.
void Before() ESPER_UNCHECKED {
  if (held == 0) TheMutex().Lock();
}

void InParent() ESPER_UNCHECKED {
  if (held == 0) TheMutex().Unlock();
}

// The mutex knows its writer by the number of the thread, which is another in the child, and the
// parent's other threads, which may be waiting for it, are still counted in it.
void InChild() ESPER_UNCHECKED {
  new (&TheMutex()) SharedMutex;
  if (held != 0) TheMutex().LockShared();
}

}  // namespace

void AtFork(void (*before)(), void (*in_parent)(), void (*in_child)()) {
  if (pthread_atfork(before, in_parent, in_child) != 0) {
    throw std::runtime_error("pthread_atfork failed: no memory is left");
  }
}

NoFork::NoFork() ESPER_UNCHECKED {
  static const bool guarded = (AtFork(&Before, &InParent, &InChild), true);
  static_cast<void>(guarded);
  if (held++ == 0) TheMutex().LockShared();
}

NoFork::~NoFork() ESPER_UNCHECKED {
  if (--held == 0) TheMutex().UnlockShared();
}

}  // namespace esper
