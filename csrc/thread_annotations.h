#pragma once

// Clang's thread-safety analysis (-Wthread-safety); nothing elsewhere. The standard library's
// mutexes are not annotated in libstdc++, so what guards something is one of those below.

#include <condition_variable>
#include <mutex>
#include <shared_mutex>

#if defined(__clang__)
#define ESPER_TSA(x) __attribute__((x))
#else
#define ESPER_TSA(x)
#endif

#define ESPER_CAPABILITY ESPER_TSA(capability("mutex"))
#define ESPER_SCOPED ESPER_TSA(scoped_lockable)
#define ESPER_GUARDED_BY(m) ESPER_TSA(guarded_by(m))
#define ESPER_REQUIRES(m) ESPER_TSA(requires_capability(m))
#define ESPER_EXCLUDES(m) ESPER_TSA(locks_excluded(m))
#define ESPER_ACQUIRE(...) ESPER_TSA(acquire_capability(__VA_ARGS__))
#define ESPER_TRY_ACQUIRE(...) ESPER_TSA(try_acquire_capability(__VA_ARGS__))
#define ESPER_ACQUIRE_SHARED(...) ESPER_TSA(acquire_shared_capability(__VA_ARGS__))
#define ESPER_RELEASE_SHARED(...) ESPER_TSA(release_generic_capability(__VA_ARGS__))
#define ESPER_RELEASE(...) ESPER_TSA(release_capability(__VA_ARGS__))
#define ESPER_UNCHECKED ESPER_TSA(no_thread_safety_analysis)

namespace esper {

class ESPER_CAPABILITY Mutex {
 public:
  void Lock() ESPER_ACQUIRE() { mutex_.lock(); }
  void Unlock() ESPER_RELEASE() { mutex_.unlock(); }
  bool TryLock() ESPER_TRY_ACQUIRE(true) { return mutex_.try_lock(); }
  std::mutex& native() { return mutex_; }  // for condition variables

 private:
  std::mutex mutex_;
};

class ESPER_SCOPED Locked {
 public:
  explicit Locked(Mutex& mutex) ESPER_ACQUIRE(mutex) : lock_(mutex.native()) {}
  ~Locked() ESPER_RELEASE() = default;

  // Gives the mutex up while it waits, and has it again when it returns; it may return with
  // nothing signalled. Without a predicate, for the analysis does not see into a lambda.
  void Wait(std::condition_variable& signal) { signal.wait(lock_); }

 private:
  std::unique_lock<std::mutex> lock_;
};

// Many readers or one writer.
class ESPER_CAPABILITY SharedMutex {
 public:
  void Lock() ESPER_ACQUIRE() { mutex_.lock(); }
  void Unlock() ESPER_RELEASE() { mutex_.unlock(); }
  void LockShared() ESPER_ACQUIRE_SHARED() { mutex_.lock_shared(); }
  void UnlockShared() ESPER_RELEASE_SHARED() { mutex_.unlock_shared(); }
  std::shared_mutex& native() { return mutex_; }

 private:
  std::shared_mutex mutex_;
};

class ESPER_SCOPED Writing {
 public:
  explicit Writing(SharedMutex& mutex) ESPER_ACQUIRE(mutex) : lock_(mutex.native()) {}
  ~Writing() ESPER_RELEASE() = default;

 private:
  const std::unique_lock<std::shared_mutex> lock_;
};

class ESPER_SCOPED Reading {
 public:
  explicit Reading(SharedMutex& mutex) ESPER_ACQUIRE_SHARED(mutex) : lock_(mutex.native()) {}
  ~Reading() ESPER_RELEASE_SHARED() = default;

 private:
  const std::shared_lock<std::shared_mutex> lock_;
};

}  // namespace esper
