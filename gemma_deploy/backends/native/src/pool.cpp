#include "pool.h"

#include <algorithm>
#include <chrono>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gemma {
namespace {

constexpr int kSpins = 4000;  // about 50 microseconds: as long as a phase of a step takes, no longer

// Steps are compared by their mean over at least so many, and so many seconds.
constexpr int kSteps = 4;
constexpr double kLong = 0.08;
constexpr double kHeld = 0.1;    // of the time of steps: waiting that is suspicious
constexpr double kGain = 1.1;    // what helpers have to give
constexpr double kStay = 1;      // seconds that helpers are left alone when they do give it
constexpr double kShortRest = 1, kLongRest = 32, kLonger = 4;
constexpr double kQuieter = 0.7;  // of the time of a step: the machine is less busy than when the rest began

thread_local int thread_index = 0;

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

double Seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

constexpr uint64_t Word(int n, uint32_t taken) { return static_cast<uint64_t>(n) << 32 | taken; }
constexpr int All(uint64_t word) { return static_cast<int>(word >> 32); }
constexpr int Next(uint64_t word) { return static_cast<int>(word & 0xffffffff); }

}  // namespace

// Who takes the last piece holds the others up for half a piece: that is no suspicion.
void Payoff::Waited(int own, double own_time, double waited) {
  const double piece = own > 0 ? own_time / own : 0;
  if (waited > 2 * piece + 1e-4) held_ += waited;
}

void Payoff::Turn(State state, double now) {
  state_ = state;
  steps_ = 0;
  time_ = held_ = 0;
  if (state == State::kHelped) until_ = now + kStay;
  if (state != State::kResting) return;
  rests_++;
  rest_ = std::max(kShortRest, std::min(kLonger * rest_, kLongRest));
  until_ = now + rest_;
  first_ = 0;
}

bool Payoff::Step(int rows, double seconds, double now) {
  int size = 0;
  while (rows >> size > 1) size++;
  if (size != size_) {
    size_ = size;
    steps_ = 0;
    time_ = held_ = 0;
    if (state_ != State::kResting || now >= until_) state_ = State::kHelped;
  } else {
    steps_++;
    time_ += seconds;
    if (steps_ >= kSteps && time_ >= kLong) {
      Judge(time_ / steps_, now);
    } else if (state_ == State::kTriedAgain && time_ > kSteps * before_ && time_ >= kLong) {
      Turn(State::kResting, now);  // it is slower already
    }
  }
  return state_ == State::kHelped || state_ == State::kTriedAgain;
}

// A step takes so many seconds in this state.
void Payoff::Judge(double step, double now) {
  switch (state_) {
    case State::kHelped:
      if (now >= until_ && held_ > kHeld * time_) {
        before_ = step;
        return Turn(State::kTried, now);
      }
      steps_ = 0;
      time_ = held_ = 0;
      return;
    case State::kTried:  // without helpers
      return step > before_ * kGain ? Turn(State::kHelped, now) : Turn(State::kResting, now);
    case State::kResting:
      if (first_ == 0) first_ = step;
      if (now >= until_ || step < first_ * kQuieter) {
        before_ = step;
        return Turn(State::kTriedAgain, now);
      }
      steps_ = 0;
      time_ = held_ = 0;
      return;
    case State::kTriedAgain:
      if (step * kGain >= before_) return Turn(State::kResting, now);
      rest_ /= kLonger * kLonger;  // it may have been luck
      return Turn(State::kHelped, now);
  }
}

#if defined(__linux__)
void Pool::Bell::Wait(uint32_t seen) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&rung_), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}

// Who goes to sleep behind the first line is counted for the next time; who did before it finds the number changed.
void Pool::Bell::Wake() {
  sleepers_.store(0, std::memory_order_seq_cst);
  rung_.fetch_add(1, std::memory_order_seq_cst);
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&rung_), FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
}
#else
void Pool::Bell::Wait(uint32_t) { std::this_thread::sleep_for(std::chrono::microseconds(50)); }
void Pool::Bell::Wake() { sleepers_.store(0, std::memory_order_seq_cst); }
#endif

int Worker::index() { return thread_index; }

int Worker::count() const { return pool_->size(); }

Pool::Pool(int threads) : size_(threads < 1 ? 1 : threads) {
  for (int i = 1; i < size_; i++) threads_.emplace_back([this, i] { Serve(i); });
}

Pool::~Pool() {
  stop_.store(true, std::memory_order_seq_cst);
  begun_.Ring();
  for (std::thread& thread : threads_) thread.join();
}

void Pool::Run(int rows, const std::function<void(Worker&)>& f) {
  Worker worker(this);
  if (size_ == 1) return f(worker);
  const double start = Seconds();
  f(worker);
  if (rows == 0) return;
  const double now = Seconds();
  helped_ = payoff_.Step(rows, now - start, now);
  counts_.rests = payoff_.rests();
}

void Pool::Share(int n, Piece piece, const void* work) {
  counts_.pieces += n;
  if (!helped_) {
    for (int i = 0; i < n; i++) piece(work, i);
    return;
  }
  piece_ = piece;
  work_ = work;
  done_.store(0, std::memory_order_relaxed);
  taken_.store(Word(n, 0), std::memory_order_seq_cst);
  begun_.Ring();
  const double start = Seconds();
  const int own = Take();
  const double free = Seconds();
  const auto done = [&] { return done_.load(std::memory_order_seq_cst) == n - own; };
  for (int i = 0; i < kSpins && !done(); i++) Pause();
  while (!done()) ended_.Sleep(done);
  const double now = Seconds();
  if (own < n) payoff_.Waited(own, free - start, now - free);
  counts_.helped += n - own;
  counts_.waited += now - free;
}

bool Pool::Left() const {
  const uint64_t word = taken_.load(std::memory_order_seq_cst);
  return Next(word) < All(word);
}

int Pool::Take() {
  int count = 0;
  while (Left()) {
    const uint64_t word = taken_.fetch_add(1, std::memory_order_acq_rel);
    if (Next(word) >= All(word)) break;
    piece_(work_, Next(word));
    count++;
  }
  return count;
}

void Pool::Serve(int index) {
  thread_index = index;
  const auto called = [&] { return Left() || stop_.load(std::memory_order_seq_cst); };
  for (;;) {
    for (int i = 0; i < kSpins && !called(); i++) Pause();
    while (!called()) begun_.Sleep(called);
    if (stop_.load(std::memory_order_seq_cst)) return;
    const int count = Take();
    if (count == 0) continue;
    done_.fetch_add(count, std::memory_order_seq_cst);  // what the pool holds may change from here on
    ended_.Ring();
  }
}

}  // namespace gemma
