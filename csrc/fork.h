#pragma once

#include "thread_annotations.h"

namespace esper {

// pthread_atfork, with an error where it has no memory left. Handlers that lock mutexes run in no
// order that others could know: what they lock must not be waited for by whoever holds another.
void AtFork(void (*before)(), void (*in_parent)(), void (*in_child)());

// For as long as one lives, fork(2) waits.
//
// To be held where a child would inherit what only another thread can finish: around every opening
// and closing of a library, and around every run of compiled code on a CPU. The dynamic linker has
// a lock of its own, which no fork hands on: a child that is made while another thread opens a
// library can never open one itself. Compiled code keeps one model: a child that is made while
// another thread runs it would wait for it for ever.
//
// Any number may live at a time, also of one thread. Whoever holds one must not wait for Python's
// lock, not even by letting go of the last reference to a tensor that Python has seen: a Python
// thread that forks holds that lock. A thread that forks below its own, as a library can that forks
// when it is opened, does not wait for itself.
class NoFork {
 public:
  NoFork();
  ~NoFork();
  NoFork(const NoFork&) = delete;
  NoFork& operator=(const NoFork&) = delete;
};

// Has a mutex, and no child inherits it held.
class ESPER_SCOPED ForkSafe {
 public:
  explicit ForkSafe(Mutex& mutex) ESPER_ACQUIRE(mutex) : lock_(mutex) {}
  ~ForkSafe() ESPER_RELEASE() = default;

 private:
  const NoFork no_fork_;  // the first: taken before the mutex, and let go of after it
  const Locked lock_;
};

}  // namespace esper
