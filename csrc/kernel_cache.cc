#include "kernel_cache.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <utility>
#include <vector>

#include <unistd.h>

#include "fork.h"

namespace esper {

// All caches of the process, for fork(2): a child must not inherit a mutex that another thread
// of the parent held at that moment.
//
// Invariants: a cache is in `caches` for as long as any thread may hold a mutex of its. From before
// a fork until after it, all of these mutexes are held, taken in the order in which they are taken
// elsewhere, too.
//
// Thread-safe by its mutex. The handlers are beyond the analysis: they lock in a loop, and from one
// function to another.
struct ForkGuard {
  Mutex mutex;
  std::vector<KernelCache*> caches ESPER_GUARDED_BY(mutex);

  static ForkGuard& The() {
    static auto* const the = new ForkGuard;  // never destroyed: fork may come late
    static const bool guarded = (AtFork(&Before, &InParent, &InChild), true);
    static_cast<void>(guarded);
    return *the;
  }

  void Add(KernelCache* cache) ESPER_EXCLUDES(mutex) {
    const Locked lock(mutex);
    caches.push_back(cache);
  }
  void Remove(KernelCache* cache) ESPER_EXCLUDES(mutex) {
    const Locked lock(mutex);
    std::erase(caches, cache);
  }

  static void Before() ESPER_UNCHECKED {
    The().mutex.Lock();
    for (auto* const cache : The().caches) {
      cache->mutex_.Lock();
      cache->pool_.BeforeFork();
      cache->cache_.BeforeFork();
    }
  }
  static void InParent() ESPER_UNCHECKED {
    for (auto* const cache : The().caches) {
      cache->cache_.AfterForkInParent();
      cache->pool_.AfterForkInParent();
      cache->mutex_.Unlock();
    }
    The().mutex.Unlock();
  }
  static void InChild() ESPER_UNCHECKED {
    for (auto* const cache : The().caches) {
      cache->cache_.AfterForkInChild();
      cache->pool_.AfterForkInChild();
      cache->reading_.clear();
      cache->mutex_.Unlock();
    }
    The().mutex.Unlock();
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
  ForkGuard::The().Add(this);
}

KernelCache::~KernelCache() {
  pool_.Close();  // whose threads take the mutexes
  ForkGuard::The().Remove(this);
}

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
