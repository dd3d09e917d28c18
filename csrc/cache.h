#pragma once

// A bounded cache of things that are dear to load. No torch and no Python in here, so that it
// can be put under a race detector by itself (tests/native/cache_stress.cc).

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <list>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "thread_annotations.h"

namespace esper {

// Everything in the cache is in use, and there is no room for one more.
struct CacheFull : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct CacheStatistics {
  uint64_t hits = 0;
  uint64_t misses = 0;     // calls that loaded or waited for a load
  uint64_t loads = 0;      // loads that succeeded
  uint64_t failures = 0;   // loads that threw, CacheFull included
  uint64_t evictions = 0;
  uint64_t resident_bytes = 0;
  uint64_t resident_count = 0;
  uint64_t load_nanoseconds = 0;      // of all loads that succeeded
  uint64_t longest_load_nanoseconds = 0;
};

// Least recently used goes first; what somebody holds a reference to is pinned and stays.
//
// `Pointer` is a counting pointer (std::shared_ptr, c10::intrusive_ptr): the cache keeps one
// reference, and a value whose use_count() is 1 is nobody's but the cache's.
//
// Invariants, whenever the mutex is free:
//   1. lru_ and entries_ hold the same entries, lru_ with the most recently used in front;
//   2. resident bytes and count are the sums over entries_, and within the limits; what is
//      loaded and not yet entered is not counted;
//   3. a key is in loading_ exactly while one thread, and one only, runs its load;
//   4. values are loaded and destroyed outside of the mutex, so that no load, and no closing of
//      a library, ever makes a hit wait.
// A value that use_count() shows to be nobody's stays so while the mutex is held: references
// are made from the cache's own only under the mutex, and others are copies of those.
//
// Thread-safe. Statistics are atomics, each right by itself; to read them takes no lock, so two
// of them may be of different moments. A load must not ask the cache for its own key.
template <typename Pointer>
class Cache {
 public:
  struct Loaded {
    Pointer value;
    uint64_t bytes;
  };
  using Load = std::function<Loaded()>;

  Cache(uint64_t max_bytes, uint64_t max_count) : max_bytes_(max_bytes), max_count_(max_count) {}
  Cache(const Cache&) = delete;
  Cache& operator=(const Cache&) = delete;

  // The value, or null. Never waits for a load.
  Pointer Find(std::string_view key) ESPER_EXCLUDES(mutex_) {
    const Locked lock(mutex_);
    return Touch(key);
  }

  // The value, loaded by this call or by whichever came first. Throws what the load throws, to
  // all that waited for it, and CacheFull; a failed load leaves nothing behind.
  Pointer Get(const std::string& key, const Load& load) ESPER_EXCLUDES(mutex_) {
    std::shared_ptr<Flight> flight;
    bool mine = false;
    {
      Locked lock(mutex_);
      if (Pointer found = Touch(key)) return found;
      Increase(misses_, 1);
      auto [place, is_new] = loading_.try_emplace(key);
      if (is_new) place->second = std::make_shared<Flight>();
      flight = place->second;
      mine = is_new;
      while (!mine && Flies(key, flight)) lock.Wait(landed_);
    }
    if (mine) Fly(key, load, *flight);
    if (flight->error) std::rethrow_exception(flight->error);
    return flight->value;
  }

  // Drops the value if nobody uses it; whether it did.
  bool Evict(std::string_view key) ESPER_EXCLUDES(mutex_) {
    Pointer out;  // destroyed after the mutex is released
    const Locked lock(mutex_);
    const auto place = entries_.find(key);
    if (place == entries_.end() || place->second->value.use_count() > 1) return false;
    out = Remove(place->second);
    return true;
  }

  CacheStatistics Statistics() const {
    constexpr auto relaxed = std::memory_order_relaxed;
    return {hits_.load(relaxed),           misses_.load(relaxed),
            loads_.load(relaxed),          failures_.load(relaxed),
            evictions_.load(relaxed),      resident_bytes_.load(relaxed),
            resident_count_.load(relaxed), load_nanoseconds_.load(relaxed),
            longest_load_.load(relaxed)};
  }

  // Around fork(2), so that a child never inherits the mutex locked by a thread it has not.
  void BeforeFork() ESPER_ACQUIRE(mutex_) { mutex_.Lock(); }
  void AfterForkInParent() ESPER_RELEASE(mutex_) { mutex_.Unlock(); }
  void AfterForkInChild() ESPER_RELEASE(mutex_) {
    loading_.clear();                         // the threads that were loading are the parent's,
    new (&landed_) std::condition_variable;  // and so are those that were waiting
    mutex_.Unlock();
  }

 private:
  struct Entry {
    std::string key;
    Pointer value;
    uint64_t bytes;
  };
  using Order = std::list<Entry>;
  struct Flight {  // written by who loads, before it leaves loading_; read by others after that
    Pointer value;
    std::exception_ptr error;
  };

  // Keys are digests: a part of one spreads as well as the whole.
  struct Hash {
    size_t operator()(std::string_view key) const {
      return std::hash<std::string_view>()(key.substr(0, 16));
    }
  };

  // All counters are written under the mutex, so they need no read-modify-write.
  static void Increase(std::atomic<uint64_t>& counter, uint64_t by) {
    constexpr auto relaxed = std::memory_order_relaxed;
    counter.store(counter.load(relaxed) + by, relaxed);
  }

  Pointer Touch(std::string_view key) ESPER_REQUIRES(mutex_) {
    const auto place = entries_.find(key);
    if (place == entries_.end()) return Pointer();
    Increase(hits_, 1);
    lru_.splice(lru_.begin(), lru_, place->second);
    return place->second->value;
  }

  bool Flies(const std::string& key, const std::shared_ptr<Flight>& flight) const
      ESPER_REQUIRES(mutex_) {
    const auto place = loading_.find(key);
    return place != loading_.end() && place->second == flight;
  }

  void Fly(const std::string& key, const Load& load, Flight& flight) ESPER_EXCLUDES(mutex_) {
    const auto started = std::chrono::steady_clock::now();
    Loaded loaded{};
    try {
      loaded = load();
    } catch (...) {
      flight.error = std::current_exception();
    }
    const auto nanoseconds = static_cast<uint64_t>(
        std::chrono::nanoseconds(std::chrono::steady_clock::now() - started).count());
    std::vector<Pointer> out;  // destroyed after the mutex is released
    {
      const Locked lock(mutex_);
      if (!flight.error) {
        try {
          MakeRoom(key, loaded.bytes, out);
          lru_.push_front({key, loaded.value, loaded.bytes});
          entries_.emplace(lru_.front().key, lru_.begin());
          Count(loaded.bytes, nanoseconds);
          flight.value = std::move(loaded.value);
        } catch (...) {
          flight.error = std::current_exception();
        }
      }
      if (flight.error) Increase(failures_, 1);
      loading_.erase(key);
    }
    landed_.notify_all();
  }

  void MakeRoom(const std::string& key, uint64_t bytes, std::vector<Pointer>& out)
      ESPER_REQUIRES(mutex_) {
    if (bytes > max_bytes_) {
      throw CacheFull("kernel " + key + " takes " + std::to_string(bytes) + " bytes, the cache " +
                      "holds " + std::to_string(max_bytes_) + "; raise ESPER_CACHE_BYTES");
    }
    auto fits = [&](uint64_t freed_bytes, uint64_t freed_count) {
      return resident_bytes_.load() - freed_bytes + bytes <= max_bytes_ &&
             resident_count_.load() - freed_count + 1 <= max_count_;
    };
    // Look before anything goes: where the pinned ones alone are too many, nothing is evicted.
    std::vector<typename Order::iterator> victims;
    uint64_t freed = 0;
    for (auto at = lru_.end(); !fits(freed, victims.size());) {
      if (at == lru_.begin()) {
        throw CacheFull(
            "no room for kernel " + key + " of " + std::to_string(bytes) + " bytes: of " +
            std::to_string(resident_count_.load()) + " kernels with " +
            std::to_string(resident_bytes_.load()) + " bytes all but " +
            std::to_string(victims.size()) + " are in use, and the limits are " +
            std::to_string(max_count_) + " kernels and " + std::to_string(max_bytes_) +
            " bytes; raise them (ESPER_CACHE_KERNELS, ESPER_CACHE_BYTES), or let go of kernels");
      }
      --at;
      if (at->value.use_count() > 1) continue;
      victims.push_back(at);
      freed += at->bytes;
    }
    for (const auto& victim : victims) out.push_back(Remove(victim));
  }

  Pointer Remove(typename Order::iterator entry) ESPER_REQUIRES(mutex_) {
    Pointer value = std::move(entry->value);
    Increase(resident_bytes_, -entry->bytes);  // unsigned: wraps around to the difference
    Increase(resident_count_, -uint64_t{1});
    Increase(evictions_, 1);
    entries_.erase(entry->key);
    lru_.erase(entry);
    return value;
  }

  void Count(uint64_t bytes, uint64_t nanoseconds) ESPER_REQUIRES(mutex_) {
    Increase(resident_bytes_, bytes);
    Increase(resident_count_, 1);
    Increase(loads_, 1);
    Increase(load_nanoseconds_, nanoseconds);
    longest_load_.store(std::max(longest_load_.load(), nanoseconds), std::memory_order_relaxed);
  }

  const uint64_t max_bytes_;
  const uint64_t max_count_;
  Mutex mutex_;
  std::condition_variable landed_;
  Order lru_ ESPER_GUARDED_BY(mutex_);
  // The keys are views of the entries' own, which stay in place for as long as the entry lives.
  std::unordered_map<std::string_view, typename Order::iterator, Hash> entries_
      ESPER_GUARDED_BY(mutex_);
  std::unordered_map<std::string, std::shared_ptr<Flight>> loading_ ESPER_GUARDED_BY(mutex_);

  // Written under the mutex, read without.
  std::atomic<uint64_t> hits_{0}, misses_{0}, loads_{0}, failures_{0}, evictions_{0};
  std::atomic<uint64_t> resident_bytes_{0}, resident_count_{0};
  std::atomic<uint64_t> load_nanoseconds_{0}, longest_load_{0};
};

}  // namespace esper
