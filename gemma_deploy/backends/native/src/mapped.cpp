#include "mapped.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "error.h"

namespace gemma {

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
}

Mapped::~Mapped() { munmap(const_cast<uint8_t*>(data_), size_); }

void ReadHereAndThere(const uint8_t* data, uint64_t size) {
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + size) / page * page;
  // Advice alone: nothing depends on it.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_RANDOM);
}

}  // namespace gemma
