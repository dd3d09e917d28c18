#pragma once

#include <future>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>

#include <sys/types.h>

#include "artifact.h"
#include "cache.h"
#include "thread_annotations.h"
#include "thread_pool.h"

namespace esper {

// What a pool's thread is at work on.
//
// Invariant: its result is set once, by the thread at work, which is one of the process `owner_`.
//
// Thread-safe. Wait is to be called without Python's lock.
template <typename T>
class Pending {
 public:
  bool Done() const;
  // Throws what the work threw, and std::runtime_error in a child of the process that asked: the
  // thread at work is not in it.
  T Wait() const;

 private:
  friend class KernelCache;
  explicit Pending(std::shared_future<T> result);
  bool Failed() const;

  const std::shared_future<T> result_;
  const pid_t owner_;
};

// Opened kernels by the digest of their artifact. Kernels that somebody holds are pinned.
//
// A kernel comes in two steps, for between them Python looks at what the artifact says of
// itself: Read takes it into memory and checks its digest, Open opens the code. Both run on the
// cache's own threads, which never need Python's lock, and both happen once however many ask at
// a time. What was read is gone when the last who asked for it lets go of it.
//
// Invariants: a kernel in the cache is of the artifact whose digest is its key. `reading_` holds
// what is being read or is still in somebody's hands, by digest and path. Where more than one of
// the mutexes is held, they were taken in the order mutex_, the pool's, the cache's; kernels and
// artifacts are destroyed under none of them.
//
// Thread-safe. Find never waits for a load.
class KernelCache {
 public:
  using Kernel = c10::intrusive_ptr<SeedKernel>;
  using Sealed = std::shared_ptr<const Artifact>;

  KernelCache(uint64_t max_bytes, uint64_t max_count, size_t threads);
  KernelCache(const KernelCache&) = delete;
  KernelCache& operator=(const KernelCache&) = delete;
  ~KernelCache();

  // The kernel, or null where it is not here.
  Kernel Find(std::string_view digest) { return cache_.Find(digest); }
  // Fails as ReadArtifact does.
  std::shared_ptr<Pending<Sealed>> Read(const std::string& path, const std::string& digest)
      ESPER_EXCLUDES(mutex_);
  // Fails as OpenArtifact does, and with CacheFull.
  std::shared_ptr<Pending<Kernel>> Open(Sealed artifact, Convention convention);
  // Closes a kernel that nobody holds; whether it did.
  bool Evict(std::string_view digest) { return cache_.Evict(digest); }
  CacheStatistics Statistics() const { return cache_.Statistics(); }

 private:
  friend struct ForkGuard;

  Cache<Kernel> cache_;
  Mutex mutex_;
  std::unordered_map<std::string, std::weak_ptr<Pending<Sealed>>> reading_
      ESPER_GUARDED_BY(mutex_);
  ThreadPool pool_;  // the last: its threads use the others
};

}  // namespace esper
