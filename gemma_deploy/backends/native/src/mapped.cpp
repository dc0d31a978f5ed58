#include "mapped.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>

#include "error.h"

namespace gemma {

// What a handler of signals may look at: no memory is taken or given back, and no lock.
struct Watched {
  std::atomic<uintptr_t> begin{0}, end{0};  // end 0: nobody's
  std::atomic<bool> cut{false};
};

namespace {

static_assert(std::atomic<uintptr_t>::is_always_lock_free && std::atomic<bool>::is_always_lock_free);

constexpr int kMostWatched = 256;
Watched watched[kMostWatched];
std::mutex watching;
struct sigaction before;

// A page that is read is not there. Of a mapped file: all of it becomes zeros, which the reader goes on with. Elsewhere:
// what would have happened without this handler.
void Missing(int number, siginfo_t* about, void* context) {
  const int error = errno;
  const uintptr_t at = reinterpret_cast<uintptr_t>(about->si_addr);
  for (Watched& one : watched) {
    const uintptr_t begin = one.begin.load(), end = one.end.load();
    if (about->si_code <= 0 || at < begin || at >= end) continue;
    one.cut.store(true);
    void* made = mmap(reinterpret_cast<void*>(begin), end - begin, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    errno = error;
    if (made != MAP_FAILED) return;
  }
  if ((before.sa_flags & SA_SIGINFO) != 0) {
    before.sa_sigaction(number, about, context);
  } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
    before.sa_handler(number);
  } else {
    signal(number, SIG_DFL);
    raise(number);  // when this handler has returned
  }
}

// Null where there are too many already.
Watched* Watch(uintptr_t begin, uintptr_t end) {
  const std::lock_guard<std::mutex> lock(watching);
  static const bool handled = [] {
    struct sigaction action = {};
    action.sa_sigaction = Missing;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    return sigaction(SIGBUS, &action, &before) == 0;
  }();
  for (Watched& one : watched) {
    if (!handled || one.end.load() != 0) continue;
    one.cut.store(false);
    one.begin.store(begin);
    one.end.store(end);
    return &one;
  }
  return nullptr;
}

}  // namespace

Mapped::Mapped(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) throw Error(path + ": " + std::strerror(errno));
  struct stat about;
  if (fstat(file, &about) != 0 || !S_ISREG(about.st_mode) || about.st_size <= 0) {
    close(file);
    throw Error(path + ": no file that holds anything");
  }
  size_ = static_cast<uint64_t>(about.st_size);
  void* at = mmap(nullptr, size_, PROT_READ, MAP_SHARED, file, 0);
  const int why = errno;
  close(file);
  if (at == MAP_FAILED) throw Error(path + ": " + std::strerror(why));
  data_ = static_cast<const uint8_t*>(at);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(at), page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  watched_ = Watch(begin, (begin + size_ + page - 1) / page * page);
}

Mapped::~Mapped() {
  if (watched_ != nullptr) {
    watched_->end.store(0);
    watched_->begin.store(0);
  }
  munmap(const_cast<uint8_t*>(data_), size_);
}

bool Mapped::cut() const { return watched_ != nullptr && watched_->cut.load(); }

void ReadHereAndThere(const uint8_t* data, uint64_t size) {
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + size) / page * page;
  // Advice alone: nothing depends on it.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_RANDOM);
}

}  // namespace gemma
