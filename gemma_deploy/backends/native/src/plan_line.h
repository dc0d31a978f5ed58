// One line of a plan.
#pragma once

#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <map>
#include <string>

#include "error.h"

namespace gemma {

constexpr long kLargest = 1L << 24;  // of any size in a plan

// A word, and pairs that are taken out as they are read, so that what is left over can be told.
class Line {
 public:
  Line(const std::string& text, int number) : Line("plan", text, number) {}
  // A line of something else than a plan.
  Line(const char* what, const std::string& text, int number) : what_(what), number_(number) {
    size_t at = 0;
    while (at < text.size()) {
      size_t end = text.find(' ', at);
      if (end == std::string::npos) end = text.size();
      const std::string part = text.substr(at, end - at);
      at = end + 1;
      if (part.empty()) continue;
      const size_t equals = part.find('=');
      if (word_.empty() && equals == std::string::npos) {
        word_ = part;
      } else if (equals == std::string::npos || equals == 0) {
        Fail("'" + part + "' is no key=value");
      } else if (!pairs_.emplace(part.substr(0, equals), part.substr(equals + 1)).second) {
        Fail("'" + part.substr(0, equals) + "' is there twice");
      }
    }
  }

  const std::string& word() const { return word_; }

  [[noreturn]] void Fail(const std::string& what) const {
    throw Error(std::string(what_) + ", line " + std::to_string(number_) + ": " + what);
  }

  std::string Text(const std::string& key) {
    const auto found = pairs_.find(key);
    if (found == pairs_.end()) Fail("no '" + key + "'");
    const std::string value = found->second;
    pairs_.erase(found);
    return value;
  }

  bool Has(const std::string& key) const { return pairs_.count(key) != 0; }

  long Whole(const std::string& key, long least, long most = kLargest) {
    const std::string text = Text(key);
    char* end = nullptr;
    errno = 0;
    const long value = std::strtol(text.c_str(), &end, 10);
    if (errno != 0 || end == text.c_str() || *end != 0 || value < least || value > most)
      Fail("'" + key + "' is " + text + ", not a whole number from " + std::to_string(least) + " to " +
           std::to_string(most));
    return value;
  }

  float Number(const std::string& key) {
    const std::string text = Text(key);
    char* end = nullptr;
    const float value = std::strtof(text.c_str(), &end);
    if (end == text.c_str() || *end != 0 || !std::isfinite(value)) Fail("'" + key + "' is " + text + ", not a number");
    return value;
  }

  void Done() const {
    if (!pairs_.empty()) Fail("'" + pairs_.begin()->first + "' is not known");
  }

 private:
  const char* what_;
  int number_;
  std::string word_;
  std::map<std::string, std::string> pairs_;
};

}  // namespace gemma
