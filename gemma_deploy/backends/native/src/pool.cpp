#include "pool.h"

namespace gemma {
namespace {

constexpr int kSpins = 4000;  // about 50 microseconds: as long as a phase of a step takes, no longer

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

void Pool::Signal::Raise() {
  value_.fetch_add(1, std::memory_order_seq_cst);
  if (asleep_.load(std::memory_order_seq_cst) == 0) return;
  { const std::lock_guard<std::mutex> lock(mutex_); }
  woken_.notify_all();
}

void Pool::Signal::WaitPast(unsigned seen) {
  for (int i = 0; i < kSpins; i++) {
    if (value() != seen) return;
    Pause();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  asleep_.fetch_add(1, std::memory_order_seq_cst);
  woken_.wait(lock, [&] { return value_.load(std::memory_order_seq_cst) != seen; });
  asleep_.fetch_sub(1, std::memory_order_seq_cst);
}

Pool::Pool(int threads) : size_(threads < 1 ? 1 : threads) {
  for (int i = 1; i < size_; i++) threads_.emplace_back([this, i] { Serve(i); });
}

Pool::~Pool() {
  stop_ = true;
  begun_.Raise();
  for (std::thread& thread : threads_) thread.join();
}

void Pool::Serve(int index) {
  for (unsigned seen = 0;; seen++) {
    begun_.WaitPast(seen);
    if (stop_) return;
    Worker worker(this, index);
    (*work_)(worker);
    Meet();
  }
}

void Pool::Run(const std::function<void(Worker&)>& f) {
  for (auto& next : next_) next.store(0, std::memory_order_relaxed);
  work_ = &f;
  if (size_ > 1) begun_.Raise();
  Worker worker(this, 0);
  f(worker);
  Meet();
}

void Pool::Meet() {
  if (size_ == 1) return;
  const unsigned seen = met_.value();
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    met_.Raise();
  } else {
    met_.WaitPast(seen);
  }
}

int Worker::count() const { return pool_->size(); }

int Worker::Take() { return pool_->next_[round_ % 3].fetch_add(1, std::memory_order_relaxed); }

// Nobody counts the next round's units yet: whoever is here has left the round before this one.
void Worker::Finish() {
  if (index_ == 0) pool_->next_[(round_ + 1) % 3].store(0, std::memory_order_relaxed);
  round_++;
  pool_->Meet();
}

}  // namespace gemma
