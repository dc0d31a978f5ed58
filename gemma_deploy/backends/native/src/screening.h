// A head whose codes are read by halves (planes of layout.h): all high ones, and the low ones of the likeliest tokens.
//
// The first pass gives every logit as if low halves were their mean, less half the variance of what they really give: the
// exponential of a number that is off at random is too large by that. The second pass makes those of the `candidates`
// largest products of whole codes. So, then, for every token for which the first pass does not prove that it can not be
// the largest of all: the largest logit is always that of the whole table.
//
// Which rows are taken follows from a token's own logits alone, so that its bits do not depend on its company.
#pragma once

#include <vector>

#include "array.h"
#include "kernels.h"
#include "pool.h"

namespace gemma {

// What was read, since the model was opened.
struct ScreenCounts {
  uint64_t tokens;  // whose logits were computed
  uint64_t rows;    // of the table, read whole for them
  uint64_t proofs;  // tokens for which the candidates did not suffice
  uint64_t more;    // rows that were read whole for these besides
};

class Screening {
 public:
  // Logits [rows][matrix.rows] of rows that are rounded already, each `row_spans` of the spans; `vocabulary` of the matrix's
  // rows count.
  void Run(Worker& worker, const Kernels& level, const Matrix& matrix, const Span* spans, int row_spans, int rows,
           int vocabulary, int candidates, float* logits);

  ScreenCounts counts() const { return counts_; }

 private:
  // Rows of a table that are looked at by one thread.
  static constexpr int kPart = 4096;
  // Distances from the largest logit by 32 steps in each power of two, from 2^-20 to 2^12.
  static constexpr int kBins = 1024, kSteps = 5, kLeast = (127 - 20) << kSteps;

  struct Part {  // of a token
    float largest, best;
    int take;  // of the last bin that is taken, so many
    int refined, more;
    uint16_t counts[kBins];
  };
  struct Token {
    float largest, best;
    int bin;  // the last that is taken
  };

  static int BinOf(float distance);
  void Grow(const Matrix& matrix, int rows);
  void Prepare(const Matrix& matrix, const Span* spans, int row);
  static void Count(const float* logits, int begin, int end, float largest, Part* part);
  void Choose(int row, int candidates);
  static int Listed(const float* logits, int begin, int end, const Token& token, int take, int32_t* list);
  void Refine(const Kernels& level, const Matrix& matrix, int row, int begin, int end, float* logits, Part* part);
  void Prove(const Kernels& level, const Matrix& matrix, int row, int begin, int end, float* logits, Part* part);
  Part& PartOf(int row, int part) { return parts_[static_cast<size_t>(row) * each_ + part]; }

  int each_ = 0;  // parts of a token
  size_t panels_ = 0;
  std::vector<Part> parts_;
  std::vector<Token> tokens_;
  std::vector<Screened> screened_;
  Array<int16_t> codes_;
  Array<int8_t> bytes_;
  Array<float> sums_, ceilings_;
  Array<uint16_t> done_;  // [rows][panels]: a bit for each row that was read whole
  ScreenCounts counts_{};
};

}  // namespace gemma
