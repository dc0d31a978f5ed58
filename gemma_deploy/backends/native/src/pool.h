// Threads that help the caller with pieces of work.
//
// Only the caller runs a model. Where it has pieces that do not depend on each other it shares them out, and helpers that
// happen to be running take some. Nobody waits for a helper that has not taken a piece: on a loaded machine the caller does
// all of them. It waits for a piece that a helper holds; where such waiting costs more than helpers give, as it does when
// the scheduler takes them off their processor, they rest for a while (Payoff).
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace gemma {

// Whether helpers are worth it.
//
// On a busy machine a helper may be taken off its processor within a piece, so that all wait for it; and what it is given of
// the processors may be taken from the caller. Where waiting gets long, some steps are computed without helpers, and where
// these are not slower, helpers rest for a while before they are tried again, each time longer.
class Payoff {
 public:
  // The caller waited for pieces that helpers held, when it had done `own` of its own in `own_time` seconds.
  void Waited(int own, double own_time, double waited);
  // A step of so many rows took `seconds` and ended at `now`: whether helpers are wanted in the next.
  bool Step(int rows, double seconds, double now);
  // How often they were sent to rest.
  uint64_t rests() const { return rests_; }

 private:
  enum class State { kHelped, kTried, kResting, kTriedAgain };

  void Turn(State state, double now);
  void Judge(double step, double now);

  State state_ = State::kHelped;
  int size_ = 0, steps_ = 0;     // of this state; steps of other sizes (powers of two) are not compared
  double time_ = 0, held_ = 0;   // of these: seconds in all, and waited for helpers that were held up
  double before_ = 0, first_ = 0;  // seconds that a step took in the state before, and when a rest began
  double until_ = 0, rest_ = 0;  // no other state before; how long the last rest was
  uint64_t rests_ = 0;
};

class Pool;

// What a function that runs in a pool shares work with.
class Worker {
 public:
  explicit Worker(Pool* pool) : pool_(pool) {}

  // The thread that asks: 0 is the caller, 1 and on are helpers.
  static int index();
  int count() const;

  // Calls f(i) for every i below n, each once and by whichever thread is free; returns when all are done.
  template <class F>
  void Each(int n, const F& f);

 private:
  Pool* pool_;
};

// What became of work since a pool was made.
struct PoolCounts {
  uint64_t pieces;  // of all that could have been shared out
  uint64_t helped;  // of these, done by helpers
  uint64_t rests;   // how often helpers were sent to rest because they did not pay off
  double waited;    // seconds that the caller waited for pieces that helpers held
};

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return size_; }
  PoolCounts counts() const { return counts_; }

  // Runs f, a step of so many rows, or 0 for what is no step, which may share work out. Not to be called by two threads at
  // once.
  void Run(int rows, const std::function<void(Worker&)>& f);

 private:
  friend class Worker;
  using Piece = void (*)(const void* work, int index);

  // What threads sleep on. Nobody who rings it ever waits.
  class Bell {
   public:
    // Sleeps until it is rung, but for where `done()` is true already; may also wake for no reason.
    template <class F>
    void Sleep(const F& done) {
      const uint32_t seen = rung_.load(std::memory_order_seq_cst);
      sleepers_.fetch_add(1, std::memory_order_seq_cst);  // who makes it done from now on rings
      if (!done()) Wait(seen);
    }
    // Called behind what makes it done.
    void Ring() {
      if (sleepers_.load(std::memory_order_seq_cst) != 0) Wake();
    }

   private:
    void Wait(uint32_t seen);
    void Wake();

    std::atomic<uint32_t> rung_{0}, sleepers_{0};
  };

  void Share(int n, Piece piece, const void* work);
  // Does pieces until none is left: how many.
  int Take();
  void Serve(int index);
  bool Left() const;

  const int size_;
  std::vector<std::thread> threads_;
  std::atomic<bool> stop_{false};
  bool helped_ = true;  // whether helpers are wanted in this step
  PoolCounts counts_{};
  Payoff payoff_;

  // What is shared out. Who has taken a piece may read it: it does not change until that piece is done.
  Piece piece_ = nullptr;
  const void* work_ = nullptr;
  // How many pieces there are and how many are taken, 32 bits each: one number, so that nobody takes a piece of this work
  // for one of that before.
  alignas(64) std::atomic<uint64_t> taken_{0};
  alignas(64) std::atomic<int> done_{0};  // by helpers
  alignas(64) Bell begun_;
  Bell ended_;
};

template <class F>
void Worker::Each(int n, const F& f) {
  if (n < 2 || pool_->size() == 1) {
    for (int i = 0; i < n; i++) f(i);
    return;
  }
  pool_->Share(n, [](const void* work, int i) { (*static_cast<const F*>(work))(i); }, &f);
}

}  // namespace gemma
