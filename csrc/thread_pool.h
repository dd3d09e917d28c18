#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <thread>
#include <vector>

#include "thread_annotations.h"

namespace esper {

// A few threads that run tasks in order of arrival.
//
// Invariants: a task runs at most once; tasks that were accepted run before Close returns. A forked child has none of the threads and none of the tasks; it starts threads of
// its own when it is first given a task.
//
// Thread-safe. Tasks must not throw, and must not need Python's lock.
class ThreadPool {
 public:
  explicit ThreadPool(size_t threads) : size_(threads) {}
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool() { Close(); }

  // Throws std::system_error where no thread can be started; the task was not accepted then.
  void Submit(std::function<void()> task) ESPER_EXCLUDES(mutex_);

  // Waits for the tasks that were accepted; none may be submitted any more.
  void Close() ESPER_EXCLUDES(mutex_);

  void BeforeFork() ESPER_ACQUIRE(mutex_) { mutex_.Lock(); }
  void AfterForkInParent() ESPER_RELEASE(mutex_) { mutex_.Unlock(); }
  void AfterForkInChild() ESPER_RELEASE(mutex_);

 private:
  void Work() ESPER_EXCLUDES(mutex_);

  const size_t size_;
  Mutex mutex_;
  std::condition_variable signal_;
  std::deque<std::function<void()>> tasks_ ESPER_GUARDED_BY(mutex_);
  std::vector<std::thread> threads_ ESPER_GUARDED_BY(mutex_);
  bool ending_ ESPER_GUARDED_BY(mutex_) = false;
};

}  // namespace esper
