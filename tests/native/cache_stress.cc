// The cache and the thread pool under a race detector: eight threads, a million operations.
//
//   g++ -std=c++20 -fsanitize=thread -I csrc tests/native/cache_stress.cc csrc/thread_pool.cc
//
// Beside races it looks for what must hold whatever the order: a key is loaded by one thread at a
// time, a value is that of its key, one that is held is never evicted, a failed load leaves
// nothing, and at the end nothing is lost and nothing is over the limits.

#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cache.h"
#include "thread_pool.h"

namespace {

constexpr int kThreads = 8, kKeys = 64;
constexpr uint64_t kMaxBytes = 300, kMaxCount = 24;

void Need(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "cache_stress: %s\n", what);
  std::abort();
}

std::atomic<int64_t> alive{0};

struct Value {
  explicit Value(int key) : key(key) { ++alive; }
  ~Value() { --alive; }
  const int key;
};

using Pointer = std::shared_ptr<Value>;
using Cache = esper::Cache<Pointer>;

class Stress {
 public:
  explicit Stress(int64_t operations) : each_(operations / kThreads) {
    for (int i = 0; i < kKeys; ++i) keys_.push_back("digest " + std::to_string(i * 7919));
  }

  void Run() {
    std::vector<std::thread> threads;
    for (int i = 0; i < kThreads; ++i) threads.emplace_back([this, i] { Work(i); });
    for (auto& thread : threads) thread.join();
    pool_.reset();  // what it was given is done before it is gone
  }

  void Check() const {
    const auto s = cache_.Statistics();
    Need(s.loads - s.evictions == s.resident_count, "loads less evictions are not what is there");
    Need(s.resident_count <= kMaxCount && s.resident_bytes <= kMaxBytes, "over the limits");
    Need(static_cast<uint64_t>(alive.load()) == s.resident_count, "a value is lost, or kept");
    std::printf("cache_stress: %ld operations: %lu hits, %lu misses, %lu loads, %lu failures, "
                "%lu evictions, %lu resident\n", static_cast<long>(each_ * kThreads), s.hits,
                s.misses, s.loads, s.failures, s.evictions, s.resident_count);
    Need(s.hits > 0 && s.failures > 0 && s.evictions > 0 &&
             s.misses > s.loads + s.failures, "the stress never reached its subject");
  }

 private:
  static uint64_t BytesOf(int key) { return 4 + static_cast<uint64_t>(key) % 29; }

  Cache::Loaded Load(int key, bool fail) {
    Need(!loading_[key].exchange(true), "two threads load one key");
    for (int i = key % 4; i > 0; --i) std::this_thread::yield();  // so that others come to wait
    Pointer value = fail ? nullptr : std::make_shared<Value>(key);
    loading_[key] = false;
    if (fail) throw std::runtime_error("as asked for");
    return {std::move(value), BytesOf(key)};
  }

  // The value, or null where the load was made to fail or the cache was full of what is held.
  Pointer Get(int key, bool fail) {
    try {
      return cache_.Get(keys_[key], [&] { return Load(key, fail); });
    } catch (const esper::CacheFull&) {
      return nullptr;
    } catch (const std::runtime_error&) {
      return nullptr;
    }
  }

  void Work(int seed) {
    std::minstd_rand random(seed + 1);
    std::array<Pointer, 4> held;
    for (int64_t i = 0; i < each_; ++i) {
      // Some keys are asked for far more often than others.
      const int key = static_cast<int>(random() % (random() % 2 ? 8 : kKeys));
      const auto what = random() % 100;
      if (what < 50) {
        const Pointer found = cache_.Find(keys_[key]);
        Need(!found || found->key == key, "a value of another key");
      } else if (what < 80) {
        Pointer got = Get(key, what == 79);
        Need(!got || got->key == key, "a value of another key");
        if (got && what < 60) held[random() % held.size()] = std::move(got);
      } else if (what < 90) {
        held[random() % held.size()] = nullptr;
      } else if (what < 95) {
        const auto& mine = held[random() % held.size()];
        if (mine) {
          Need(!cache_.Evict(keys_[mine->key]), "a value in use was evicted");
        } else {
          cache_.Evict(keys_[key]);
        }
      } else if (what < 98) {
        const auto s = cache_.Statistics();
        Need(s.resident_count <= kMaxCount + 1, "over the limits");
      } else {
        pool_->Submit([this, key] { Get(key, false); });
      }
    }
  }

  const int64_t each_;
  std::vector<std::string> keys_;
  std::array<std::atomic<bool>, kKeys> loading_{};
  Cache cache_{kMaxBytes, kMaxCount};
  std::optional<esper::ThreadPool> pool_{2};  // the last: its tasks use the others
};

}  // namespace

int main(int argc, char** argv) {
  Stress stress(argc > 1 ? std::atoll(argv[1]) : 1'000'000);
  stress.Run();
  stress.Check();
}
