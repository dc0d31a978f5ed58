// Some rows on their way through all layers.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "buffers.h"
#include "model.h"

namespace gemma {

constexpr int kUnits = 6;  // pieces of work for each thread in a product, at least

// That of a matrix, or of several that read the same rows, which is one (ReadPlan).
inline int RoundingOf(std::initializer_list<const Matrix*> readers) {
  int rounding = kUnrounded;
  for (const Matrix* m : readers) rounding = std::max(rounding, RoundingOf(*m));
  return rounding;
}

// One token of one text.
struct Token {
  Cache* cache;
  int position;
  int32_t id;
};

// One thread runs Begin, Layers, Keep, Final and Head, and shares work out; what is small where there is a single row it does alone.
class Pass {
 public:
  Pass(Model* model, Buffers* buffers, const std::vector<Token>& tokens)
      : plan_(model->plan()), layout_(model->layout()), level_(model->level()), buffers_(*buffers), tokens_(tokens),
        rows_(static_cast<int>(tokens.size())), alone_(rows_ == 1), codes_(layout_.form == kInt8), exact_(model->exact()) {}

  // Before all others: where blocks of rows for attention begin. Run by one thread.
  void Divide();
  // What the first layer reads.
  void Begin(Worker& worker);
  // Layers first..last, without last.
  void Layers(Worker& worker, int first, int last);
  // Puts these rows of a pass that came so far where this one, of their tokens alone, goes on with them.
  void Keep(const std::vector<int>& kept);
  // What leaves the final norm: [rows][hidden].
  void Final(Worker& worker, float* normed);
  // Logits of such rows, not more than the pass has rows, to logits[i * stride].
  void Head(Worker& worker, const float* normed, int rows, float* logits, size_t stride);

 private:
  struct Output {
    const Matrix* matrix;
    float* y;
    size_t stride;
    Linear linear = kLinears;  // which of the layer's
  };
  struct Adapted {  // rows of texts with the same adapter, one after another
    const Adapter* adapter;
    int first, count;
  };
  struct Rows {  // of one text, one after another
    int first, count;
  };

  RowSet& Set(const Worker&) { return buffers_.set; }
  // f(i) for all i below n: by one thread where there is one row.
  template <class F>
  void Small(Worker& worker, int n, const F& f) {
    if (!alone_) return worker.Each(n, f);
    for (int i = 0; i < n; i++) f(i);
  }
  // Of a layer, with what adapters add; -1: of none.
  void Multiply(Worker& worker, int layer, const Inputs& inputs, int rows, const Output* outputs, int count);
  void AddLow(Worker& worker, int layer, const Output* outputs, int count);
  void Vectors(Worker& worker);
  void ReadFloats(RowSet& set, int row, int rounding);
  void Norm(RowSet& set, int row, const float* weight, int rounding);
  void Attention(Worker& worker, int index);
  void Prepare(Worker& worker, int index);
  void StoreKeyValue(int index, int row, int head);
  // Puts together what a head has found in pages, to y [head_dim].
  void Combine(const LayerPlan& l, size_t head, const float* best, const float* sums, const float* found, int pages, float* y);
  void AttendAlone(Worker& worker, int index);
  void AttendRows(Worker& worker, int index);
  void AttendBlock(int thread, int index, const Rows& block, int kv_head);
  void Mlp(Worker& worker, int index);
  void Experts(Worker& worker, int index);
  void Choose(Routing& routing, int row, const ExpertsPlan& experts);
  void Order(RowSet& set, const ExpertsPlan& experts);
  // y [..., rows] of each expert that has rows, of a matrix that has `rows` for each.
  void MultiplyEach(Worker& worker, const Routing& routing, const Matrix& all, int rows, const Span* spans,
                    int row_spans, float* y, size_t stride);
  void AddVector(Worker& worker, int index);
  float* Stream(RowSet& set, int row, int stream) {
    const size_t at = row * static_cast<size_t>(buffers_.streams_stride);
    return &set.streams[at + static_cast<size_t>(stream) * buffers_.hidden_stride];
  }
  void Enter(Worker& worker);
  void Leave(Worker& worker);
  void Route(RowSet& set, int row, const float* x, const AltUpPlan& altup, const Matrix& matrix, float* y);
  void Predict(Worker& worker, int index);
  void Correct(Worker& worker, int index);
  void Laurel(Worker& worker, int index);
  void JoinLaurel(RowSet& set, int row, const LaurelPlan& laurel);
  void Scale(RowSet& set, int row, float factor);

  const Plan& plan_;
  const CacheLayout& layout_;
  const Kernels& level_;
  Buffers& buffers_;
  const std::vector<Token>& tokens_;
  const int rows_;
  const bool alone_, codes_;  // a single row; caches of codes
  const bool exact_;
  std::vector<Rows> blocks_;
  std::vector<Adapted> adapted_;
};

}  // namespace gemma
