// Of logits: the largest few, and what the logarithms of probabilities are counted from.
#pragma once

#include <vector>

#include "kernels.h"
#include "pool.h"

namespace gemma {

constexpr int kMostRanked = 1024;

// What is asked of the logits of some rows, and where it goes. Null: it is not asked for.
struct Ranks {
  int top;               // so many tokens with the largest logits, at most kMostRanked
  int32_t* ids;          // [rows, top]: the largest first, of equal ones the smaller token
  float* logits;         // [rows, top]: theirs
  // [rows]: log(sum(exp(logit))) over all tokens; logit - log_sum is log(probability). NaN where a logit is no finite
  // number; what is said of the largest means nothing then.
  float* log_sums;
  const int32_t* asked;  // [rows]: a token each
  float* asked_logits;   // [rows]: its logit
};

// One answer after another; memory is kept.
class Ranking {
 public:
  // Of rows first..first + rows of `ranks`; logits [rows][stride], of which `vocabulary` count.
  void Rank(Worker& worker, const Kernels& level, const float* logits, int rows, size_t stride, int vocabulary,
            const Ranks& ranks, size_t first);

 private:
  struct One {
    float logit;
    int32_t id;
  };
  // A piece of a row.
  struct Part {
    float largest;
    double sum;  // of exp(logit - largest)
    std::vector<One> glances;  // the largest of so many logits (kGlance), and the first of their tokens
  };

  static bool Before(const One& a, const One& b) { return a.logit > b.logit || (a.logit == b.logit && a.id < b.id); }
  static void Look(const Kernels& level, const float* logits, int begin, int end, bool sum, Part* part);
  static void Join(const Ranks& ranks, const float* logits, int vocabulary, const Part* parts, int count, size_t row);

  std::vector<Part> parts_;
};

}  // namespace gemma
