#include "slot.h"

#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <utility>

#include <pthread.h>

namespace esper {
namespace {

// Read in every step of every slot, written when something joins or leaves.
struct Registry {
  std::shared_mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<const Slot::Seeds>> seeds;  // guarded by mutex
  int64_t last = 0;                                                      // guarded by mutex
};

Registry& TheRegistry() {
  static auto* const the = new Registry;  // never destroyed: graphs may outlive everything
  // A child must not inherit a mutex that another thread of the parent held.
  static const int guarded = pthread_atfork([] { TheRegistry().mutex.lock(); },
                                            [] { TheRegistry().mutex.unlock(); },
                                            [] { TheRegistry().mutex.unlock(); });
  static_cast<void>(guarded);
  return *the;
}

int64_t Register() {
  auto& registry = TheRegistry();
  const std::lock_guard<std::shared_mutex> lock(registry.mutex);
  registry.seeds[++registry.last] = std::make_shared<const Slot::Seeds>();
  return registry.last;
}

}  // namespace

Slot::Slot() : number_(Register()) {}

Slot::~Slot() {
  std::shared_ptr<const Seeds> out;  // destroyed after the mutex is released
  auto& registry = TheRegistry();
  const std::lock_guard<std::shared_mutex> lock(registry.mutex);
  out = std::move(registry.seeds[number_]);
  registry.seeds.erase(number_);
}

void Slot::SetSeeds(Seeds seeds) {
  auto made = std::make_shared<const Seeds>(std::move(seeds));
  auto& registry = TheRegistry();
  const std::lock_guard<std::shared_mutex> lock(registry.mutex);
  registry.seeds[number_].swap(made);
}

std::shared_ptr<const Slot::Seeds> SeedsOf(int64_t number) {
  static const auto none = std::make_shared<const Slot::Seeds>();
  auto& registry = TheRegistry();
  const std::shared_lock<std::shared_mutex> lock(registry.mutex);
  const auto found = registry.seeds.find(number);
  return found == registry.seeds.end() ? none : found->second;
}

}  // namespace esper
