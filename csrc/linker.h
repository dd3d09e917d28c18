#pragma once

namespace esper {

// For as long as one lives, fork(2) waits.
//
// To be held around every opening and closing of a library. The dynamic linker has a lock of its
// own, which no fork hands on: a child that is made while another thread opens a library can never
// open one itself, and a worker of a data loader would hang at its first import.
//
// Any number may live at a time. Whoever holds one must not wait for Python's lock: a Python thread
// that forks holds that. A thread that forks below its own lock, as a library can that forks when it
// is opened, does not wait for itself.
class LinkerLock {
 public:
  LinkerLock();
  ~LinkerLock();
  LinkerLock(const LinkerLock&) = delete;
  LinkerLock& operator=(const LinkerLock&) = delete;
};

}  // namespace esper
