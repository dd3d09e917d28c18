#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "artifact.h"
#include "cache.h"
#include "thread_annotations.h"

namespace esper {

// A few threads that run tasks in order of arrival.
//
// Invariants: a task runs once; tasks that were accepted run before the destructor returns. A
// forked child has none of the threads and starts its own when it is first given a task.
//
// Thread-safe. Tasks must not throw, and must not need Python's lock.
class ThreadPool {
 public:
  explicit ThreadPool(size_t threads) : size_(threads) {}
  ~ThreadPool();

  void Submit(std::function<void()> task) ESPER_EXCLUDES(mutex_);

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

// Opened kernels by the digest of their artifact. Kernels that somebody holds are pinned.
//
// Thread-safe. Load and Wait block and are to be called without Python's lock; Find never does.
class KernelCache {
 public:
  using Kernel = c10::intrusive_ptr<SeedKernel>;

  // A load that was asked for ahead of its use.
  class Pending {
   public:
    bool Done() const ESPER_EXCLUDES(mutex_);
    // Waits; throws what the load threw.
    Kernel Wait() ESPER_EXCLUDES(mutex_);

   private:
    friend class KernelCache;
    void Finish(Kernel kernel, std::exception_ptr error) ESPER_EXCLUDES(mutex_);

    mutable Mutex mutex_;
    std::condition_variable signal_;
    bool done_ ESPER_GUARDED_BY(mutex_) = false;
    Kernel kernel_ ESPER_GUARDED_BY(mutex_);
    std::exception_ptr error_ ESPER_GUARDED_BY(mutex_);
  };

  KernelCache(uint64_t max_bytes, uint64_t max_count, size_t threads);
  ~KernelCache();

  // The kernel, or null where it is not here.
  Kernel Find(const std::string& digest) { return cache_.Find(digest); }
  // Throws as OpenArtifact does, and CacheFull.
  Kernel Load(const Expected& expected);
  std::shared_ptr<Pending> Prefetch(Expected expected);
  bool Evict(const std::string& digest) { return cache_.Evict(digest); }
  CacheStatistics Statistics() const { return cache_.Statistics(); }

 private:
  friend struct ForkGuard;

  Cache<Kernel> cache_;
  ThreadPool pool_;
};

}  // namespace esper
