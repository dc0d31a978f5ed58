// The numbers that a pass of some rows through a model works on.
#pragma once

#include <array>
#include <vector>

#include "array.h"
#include "kernels.h"
#include "plan.h"
#include "screening.h"

namespace gemma {

constexpr int Padded(int n) { return (n + 2 * kBlock - 1) / (2 * kBlock) * (2 * kBlock); }

// Rows that matrices read: floats, and rounded span by span.
class Inputs {
 public:
  // Room for so many rows of so many columns.
  void Grow(int rows, int columns);

  float* row(int r) { return values_.data() + static_cast<size_t>(r) * stride_; }
  const Span* spans() const { return spans_.data(); }
  int row_spans() const { return row_spans_; }
  int stride() const { return stride_; }  // floats from a row to the next

  // Zeros behind `columns` numbers of a row, as far as a matrix reads.
  void Pad(int row, int columns);
  // One span, or all, of a row of `columns` numbers, as RoundingOf the matrices that read it.
  void Round(const Kernels& level, int row, int span, int columns, int rounding) const;
  void RoundRow(const Kernels& level, int row, int columns, int rounding) const;

 private:
  int stride_ = 0, row_spans_ = 0;
  Array<float> values_, scales_;
  Array<int8_t> codes_;
  Array<int32_t> sums_;
  std::vector<Span> spans_;
};

// Queries rounded head by head, for caches of codes.
class HeadCodes {
 public:
  void Grow(int rows, int heads, int head_dim);
  const Span* at(int row, size_t head) const { return &spans_[static_cast<size_t>(row) * heads_ + head]; }
  // The place for the codes of a head's q.
  const Span& Point(int row, size_t head, const float* q) {
    Span& span = spans_[static_cast<size_t>(row) * heads_ + head];
    span.values = q;
    return span;
  }

 private:
  int heads_ = 0;
  Array<float> scales_;
  Array<int8_t> codes_;
  Array<int32_t> sums_;
  std::vector<Span> spans_;
};

// Which experts rows run through, and in which order: rows of one expert come together, so that it is read once.
struct Routing {
  struct Job {  // rows of one expert
    int expert, first, count;
  };
  std::vector<int> chosen;     // [rows][chosen]: experts, those with the largest weights first
  std::vector<float> weights;  // of them
  std::vector<int> places;     // where each of them comes in that order
  std::vector<Job> jobs;
  std::vector<Span> spans;  // what each reads, in that order
  Inputs inner;             // what the second matrices read, in that order
  std::vector<int> begins;  // [experts]
};

// What matrices read, and what they are made from.
struct RowSet {
  Array<float> x;       // [rows][hidden_stride]: the residual stream
  Array<float> streams;  // [rows][streams][hidden_stride]: all of them, where x is what a layer makes of one
  Array<float> q;       // [rows][q_stride]
  HeadCodes heads;      // of q
  Inputs hidden, wide;  // of the hidden size; of heads * head_dim, the MLP's width or the hidden size
  Inputs low;           // of the rank of LAuReL
  Routing routing;
};

struct Buffers {
  int rows = 0;                                     // that there is room for
  int most_heads = 0, most_head_dim = 0;
  int hidden_stride = 0, q_stride = 0, wide_stride = 0, kv_stride = 0, half_stride = 0, vectors_stride = 0;
  int most_experts = 0, most_chosen = 0, expert_width = 0, most_rank = 0, streams_stride = 0;
  RowSet set;
  Array<float> q, k, v, out, gate, up;              // [rows][...]: what matrices gave
  Array<float> scores, expert_up, expert_out;       // [rows][most_experts]; [rows * most_chosen][...]
  Array<float> low, laurel;                         // [rows][most_rank], [rows][hidden_stride]
  Array<float> brought;                             // [rows][streams][hidden_stride]: projections of streams
  Array<float> vectors;                             // [rows][vectors_stride]: those of all layers
  std::array<Inputs, 3> beside;                        // what adapters make of rows before the second product
  Array<float> best, sums, found;                   // of a single row: [heads][pages], and [heads][pages][head_dim]
  std::vector<Array<float>> own;                    // of each thread, for attention of several rows
  std::vector<Array<float>> cosines, sines;         // for each set of frequencies: [rows][half_stride]
  std::vector<const float*> frequencies;            // sets that differ
  std::vector<int> halves;                          // how many each has
  std::vector<int> set_of_layer;
  Screening screening;                              // of the head

  Buffers(const Plan& plan, int threads);
  void Grow(const Plan& plan, int rows);
  // Room for what matrices of up to such a rank make of rows, beside as many matrices of the model as read the same.
  void GrowLow(int rows, int rank);
  // Room for what a single row finds in so many pages.
  void GrowPages(const Plan& plan, int pages);
};

}  // namespace gemma
