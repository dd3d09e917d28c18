#include "thread_pool.h"

#include <new>
#include <utility>

namespace esper {

void ThreadPool::Close() {
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
    if (threads_.size() < size_) threads_.emplace_back([this] { Work(); });
    tasks_.push_back(std::move(task));
  }
  signal_.notify_one();
}

void ThreadPool::Work() {
  while (true) {
    std::function<void()> task;
    {
      Locked lock(mutex_);
      while (!ending_ && tasks_.empty()) lock.Wait(signal_);
      if (tasks_.empty()) return;
      task = std::move(tasks_.front());
      tasks_.pop_front();
    }
    task();
  }
}

void ThreadPool::AfterForkInChild() {
  // The handles are of threads that are not here: neither to be joined nor to be destroyed. Nor
  // may the signal they were waiting on be: its destructor would wait for them. The tasks are the
  // parent's too; to destroy them here would break promises to whoever waits for them.
  new std::vector<std::thread>(std::move(threads_));
  new std::deque<std::function<void()>>(std::move(tasks_));
  threads_.clear();
  tasks_.clear();
  new (&signal_) std::condition_variable;
  mutex_.Unlock();
}

}  // namespace esper
