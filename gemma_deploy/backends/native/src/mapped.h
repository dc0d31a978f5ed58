#pragma once

#include <cstdint>
#include <string>

namespace gemma {

// A file, mapped and only read.
class Mapped {
 public:
  explicit Mapped(const std::string& path);
  ~Mapped();
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;

  const uint8_t* data() const { return data_; }
  uint64_t size() const { return size_; }

 private:
  const uint8_t* data_ = nullptr;
  uint64_t size_ = 0;
};

// Tells the system that these bytes are read here and there, so that it fetches no others from the disk.
void ReadHereAndThere(const uint8_t* data, uint64_t size);

}  // namespace gemma
