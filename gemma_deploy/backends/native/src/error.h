#pragma once

#include <stdexcept>

namespace gemma {

// Something is wrong with what was given: the message says what and where.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A text is longer than the positions that there are.
class TooLong : public Error {
 public:
  using Error::Error;
};

}  // namespace gemma
