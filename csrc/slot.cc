#include "slot.h"

#include <new>
#include <unordered_map>
#include <utility>

#include "fork.h"
#include "thread_annotations.h"

namespace esper {
namespace {

// Read in every step of every slot, written when something joins or leaves.
//
// Invariant: `last` is the highest number ever given out, and every slot that lives is in `seeds`.
//
// Thread-safe by its mutex, which each use takes.
struct Registry {
  SharedMutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<const Slot::Seeds>> seeds ESPER_GUARDED_BY(mutex);
  int64_t last ESPER_GUARDED_BY(mutex) = 0;
};

Registry& TheRegistry();

// A child must not inherit a mutex that another thread of the parent held. The analysis cannot
// follow a lock from one function to another.
void BeforeFork() ESPER_UNCHECKED { TheRegistry().mutex.Lock(); }
void InParent() ESPER_UNCHECKED { TheRegistry().mutex.Unlock(); }

// Not to be unlocked here: a shared mutex knows its writer by the number of the thread, which is
// another in the child.
void InChild() { new (&TheRegistry().mutex) SharedMutex; }

Registry& TheRegistry() {
  static auto* const the = new Registry;  // never destroyed: graphs may outlive everything
  static const bool guarded = (AtFork(&BeforeFork, &InParent, &InChild), true);
  static_cast<void>(guarded);
  return *the;
}

int64_t Register() {
  auto& registry = TheRegistry();
  const Writing lock(registry.mutex);
  registry.seeds[++registry.last] = std::make_shared<const Slot::Seeds>();
  return registry.last;
}

}  // namespace

Slot::Slot() : number_(Register()) {}

Slot::~Slot() {
  std::shared_ptr<const Seeds> out;  // destroyed after the mutex is released
  auto& registry = TheRegistry();
  const Writing lock(registry.mutex);
  out = std::move(registry.seeds[number_]);
  registry.seeds.erase(number_);
}

void Slot::SetSeeds(Seeds seeds) {
  auto made = std::make_shared<const Seeds>(std::move(seeds));
  auto& registry = TheRegistry();
  const Writing lock(registry.mutex);
  registry.seeds[number_].swap(made);
}

std::shared_ptr<const Slot::Seeds> SeedsOf(int64_t number) {
  static const auto none = std::make_shared<const Slot::Seeds>();
  auto& registry = TheRegistry();
  const Reading lock(registry.mutex);
  const auto found = registry.seeds.find(number);
  return found == registry.seeds.end() ? none : found->second;
}

}  // namespace esper
