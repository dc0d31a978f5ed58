#pragma once

#include <cstdint>
#include <string>

namespace gemma {

struct Watched;

// A file, mapped and only read. Where somebody cuts it short meanwhile, or its disk fails, what is mapped becomes zeros and
// `cut` says so; without that the system would end the process (SIGBUS).
class Mapped {
 public:
  explicit Mapped(const std::string& path);
  ~Mapped();
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;

  const uint8_t* data() const { return data_; }
  uint64_t size() const { return size_; }
  bool cut() const;

 private:
  const uint8_t* data_ = nullptr;
  uint64_t size_ = 0;
  Watched* watched_ = nullptr;
};

// Tells the system that these bytes are read here and there, so that it fetches no others from the disk.
void ReadHereAndThere(const uint8_t* data, uint64_t size);

}  // namespace gemma
