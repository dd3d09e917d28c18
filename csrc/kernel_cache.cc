#include "kernel_cache.h"

#include <algorithm>
#include <mutex>
#include <utility>

#include <pthread.h>

namespace esper {

// All caches of the process, for fork(2): a child must not inherit a mutex that another thread
// of the parent held at that moment.
struct ForkGuard {
  static std::mutex& mutex() {
    static auto* const the = new std::mutex;  // never destroyed: fork may come late
    return *the;
  }
  static std::vector<KernelCache*>& caches() {
    static auto* const the = new std::vector<KernelCache*>;
    return *the;
  }

  static void Add(KernelCache* cache) {
    static const int installed = pthread_atfork(&Before, &InParent, &InChild);
    static_cast<void>(installed);
    const std::lock_guard<std::mutex> lock(mutex());
    caches().push_back(cache);
  }
  static void Remove(KernelCache* cache) {
    const std::lock_guard<std::mutex> lock(mutex());
    std::erase(caches(), cache);
  }

  static void Before() {
    mutex().lock();
    for (auto* const cache : caches()) {
      cache->pool_.BeforeFork();
      cache->cache_.BeforeFork();
    }
  }
  static void InParent() {
    for (auto* const cache : caches()) {
      cache->cache_.AfterForkInParent();
      cache->pool_.AfterForkInParent();
    }
    mutex().unlock();
  }
  static void InChild() {
    for (auto* const cache : caches()) {
      cache->cache_.AfterForkInChild();
      cache->pool_.AfterForkInChild();
    }
    mutex().unlock();
  }
};

ThreadPool::~ThreadPool() {
  std::vector<std::thread> threads;
  {
    const Locked lock(mutex_);
    ending_ = true;
    threads.swap(threads_);
  }
  signal_.notify_all();
  for (auto& thread : threads) thread.join();
}

void ThreadPool::Submit(std::function<void()> task) {
  {
    const Locked lock(mutex_);
    tasks_.push_back(std::move(task));
    if (threads_.size() < size_) threads_.emplace_back([this] { Work(); });
  }
  signal_.notify_one();
}

void ThreadPool::Work() {
  while (true) {
    std::function<void()> task;
    {
      Locked lock(mutex_);
      lock.Wait(signal_, [this] { return ending_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      task = std::move(tasks_.front());
      tasks_.pop_front();
    }
    task();
  }
}

void ThreadPool::AfterForkInChild() {
  // The handles are of threads that are not here: neither to be joined nor to be destroyed.
  new std::vector<std::thread>(std::move(threads_));
  threads_.clear();
  tasks_.clear();
  mutex_.Unlock();
}

bool KernelCache::Pending::Done() const {
  const Locked lock(mutex_);
  return done_;
}

KernelCache::Kernel KernelCache::Pending::Wait() {
  Locked lock(mutex_);
  lock.Wait(signal_, [this] { return done_; });
  if (error_) std::rethrow_exception(error_);
  return kernel_;
}

void KernelCache::Pending::Finish(Kernel kernel, std::exception_ptr error) {
  {
    const Locked lock(mutex_);
    kernel_ = std::move(kernel);
    error_ = std::move(error);
    done_ = true;
  }
  signal_.notify_all();
}

KernelCache::KernelCache(uint64_t max_bytes, uint64_t max_count, size_t threads)
    : cache_(max_bytes, max_count), pool_(threads) {
  ForkGuard::Add(this);
}

KernelCache::~KernelCache() { ForkGuard::Remove(this); }

KernelCache::Kernel KernelCache::Load(const Expected& expected) {
  return cache_.Get(expected.digest, [&] {
    Kernel kernel = OpenArtifact(expected);
    const uint64_t bytes = kernel->papers.code_bytes;
    return Cache<Kernel>::Loaded{std::move(kernel), bytes};
  });
}

std::shared_ptr<KernelCache::Pending> KernelCache::Prefetch(Expected expected) {
  auto pending = std::make_shared<Pending>();
  pool_.Submit([this, pending, expected = std::move(expected)] {
    try {
      pending->Finish(Load(expected), nullptr);
    } catch (...) {
      pending->Finish({}, std::current_exception());
    }
  });
  return pending;
}

}  // namespace esper
