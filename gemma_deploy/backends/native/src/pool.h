// Threads that run one function together: the caller is number 0.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace gemma {

class Pool;

// One thread's view of a function that all of them run. All of them call Each in the same order.
class Worker {
 public:
  Worker(Pool* pool, int index) : pool_(pool), index_(index) {}

  int index() const { return index_; }
  int count() const;

  // Calls f(i) for every i below n, each once and by whichever thread is free; then waits for all of them.
  template <class F>
  void Each(int n, const F& f) {
    for (int i; (i = Take()) < n;) f(i);
    Finish();
  }

 private:
  int Take();
  void Finish();

  Pool* pool_;
  int index_;
  unsigned round_ = 0;
};

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return size_; }

  // Runs f on all threads, and returns when all are done. Not to be called by two threads at once.
  void Run(const std::function<void(Worker&)>& f);

 private:
  friend class Worker;

  // A number that one thread raises and others wait for: they spin for a moment, then sleep.
  class Signal {
   public:
    unsigned value() const { return value_.load(std::memory_order_acquire); }
    void Raise();
    void WaitPast(unsigned seen);

   private:
    std::atomic<unsigned> value_{0};
    std::atomic<int> asleep_{0};
    std::mutex mutex_;
    std::condition_variable woken_;
  };

  void Serve(int index);
  void Meet();

  const int size_;
  std::vector<std::thread> threads_;
  const std::function<void(Worker&)>* work_ = nullptr;
  bool stop_ = false;
  Signal begun_;
  Signal met_;
  std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> next_[3] = {};
};

}  // namespace gemma
