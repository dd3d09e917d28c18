#include "kernel_cache.h"

#include <algorithm>
#include <chrono>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

#include <pthread.h>
#include <unistd.h>

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
    if (installed != 0) throw std::runtime_error("pthread_atfork failed: no memory is left");
    const std::lock_guard<std::mutex> lock(mutex());
    caches().push_back(cache);
  }
  static void Remove(KernelCache* cache) {
    const std::lock_guard<std::mutex> lock(mutex());
    std::erase(caches(), cache);
  }

  // In the order in which they are taken elsewhere, too. A loop of locks is beyond the analysis.
  static void Before() ESPER_UNCHECKED {
    mutex().lock();
    for (auto* const cache : caches()) {
      cache->mutex_.Lock();
      cache->pool_.BeforeFork();
      cache->cache_.BeforeFork();
    }
  }
  static void InParent() ESPER_UNCHECKED {
    for (auto* const cache : caches()) {
      cache->cache_.AfterForkInParent();
      cache->pool_.AfterForkInParent();
      cache->mutex_.Unlock();
    }
    mutex().unlock();
  }
  static void InChild() ESPER_UNCHECKED {
    for (auto* const cache : caches()) {
      cache->cache_.AfterForkInChild();
      cache->pool_.AfterForkInChild();
      cache->reading_.clear();
      cache->mutex_.Unlock();
    }
    mutex().unlock();
  }
};

template <typename T>
Pending<T>::Pending(std::shared_future<T> result)
    : result_(std::move(result)), owner_(getpid()) {}

template <typename T>
bool Pending<T>::Done() const {
  return result_.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
}

template <typename T>
bool Pending<T>::Failed() const {
  if (!Done()) return false;
  try {
    result_.get();
    return false;
  } catch (...) {
    return true;
  }
}

template <typename T>
T Pending<T>::Wait() const {
  if (getpid() != owner_ && !Done()) {
    throw std::runtime_error(
        "this kernel was asked for before the process was forked, and the thread at work on it "
        "is the parent's; ask for it again");
  }
  return result_.get();
}

template class Pending<KernelCache::Sealed>;
template class Pending<KernelCache::Kernel>;

KernelCache::KernelCache(uint64_t max_bytes, uint64_t max_count, size_t threads)
    : cache_(max_bytes, max_count), pool_(std::max<size_t>(threads, 1)) {
  ForkGuard::Add(this);
}

KernelCache::~KernelCache() { ForkGuard::Remove(this); }

std::shared_ptr<Pending<KernelCache::Sealed>> KernelCache::Read(const std::string& path,
                                                                const std::string& digest) {
  const std::string key = digest + ' ' + path;  // another file may be whole where this one is not
  const Locked lock(mutex_);
  if (const auto place = reading_.find(key); place != reading_.end()) {
    if (auto shared = place->second.lock(); shared && !shared->Failed()) return shared;
  }
  std::erase_if(reading_, [](const auto& entry) { return entry.second.expired(); });
  auto work = std::make_shared<std::packaged_task<Sealed()>>(
      [path, digest] { return ReadArtifact(path, digest); });
  std::shared_ptr<Pending<Sealed>> pending(new Pending<Sealed>(work->get_future().share()));
  reading_[key] = pending;
  pool_.Submit([work = std::move(work)] { (*work)(); });
  return pending;
}

std::shared_ptr<Pending<KernelCache::Kernel>> KernelCache::Open(Sealed artifact,
                                                                Convention convention) {
  auto work = std::make_shared<std::packaged_task<Kernel()>>(
      [this, artifact = std::move(artifact), convention = std::move(convention)] {
        return cache_.Get(artifact->digest, [&] {
          Kernel kernel = OpenArtifact(*artifact, convention);
          const uint64_t bytes = kernel->papers.code_bytes;
          return Cache<Kernel>::Loaded{std::move(kernel), bytes};
        });
      });
  std::shared_ptr<Pending<Kernel>> pending(new Pending<Kernel>(work->get_future().share()));
  pool_.Submit([work = std::move(work)] { (*work)(); });
  return pending;
}

}  // namespace esper
