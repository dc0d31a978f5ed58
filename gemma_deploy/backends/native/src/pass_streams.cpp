// Streams that are carried along (AltUp), and the residual beside attention (LAuReL).
#include "pass.h"

#include <algorithm>
#include <cmath>

namespace gemma {
namespace {

constexpr float kSmallest = 1e-5f;  // mean square of a stream that is brought to another's size, at least

float MeanSquare(const float* x, int n) {
  double sum = 0;
  for (int i = 0; i < n; i++) sum += static_cast<double>(x[i]) * x[i];
  return static_cast<float>(sum / n);
}

}  // namespace

// The first streams: the embeddings, and projections of them of their size.
void Pass::Enter(Worker& worker) {
  const StreamsPlan& s = plan_.streams;
  RowSet& set = Set(worker);
  int rounding = kUnrounded;
  std::vector<Output> outputs;
  const size_t all = static_cast<size_t>(buffers_.streams_stride), stride = static_cast<size_t>(buffers_.hidden_stride);
  for (int j = 1; j < s.count; j++) {
    rounding = std::max(rounding, RoundingOf(s.enter[j - 1]));
    outputs.push_back(Output{&s.enter[j - 1], &buffers_.brought[j * stride], all});
  }
  Small(worker, rows_, [&](int row) { ReadFloats(set, row, rounding); });
  Multiply(worker, -1, set.hidden, rows_, outputs.data(), s.count - 1);
  Small(worker, rows_, [&](int row) {
    const float* x = &set.x[row * stride];
    const float size = std::sqrt(MeanSquare(x, plan_.hidden));
    std::copy_n(x, plan_.hidden, Stream(set, row, 0));
    for (int j = 1; j < s.count; j++) {
      const float* from = &buffers_.brought[row * all + j * stride];
      const float own = std::sqrt(std::max(MeanSquare(from, plan_.hidden), kSmallest));
      float* to = Stream(set, row, j);
      for (int i = 0; i < plan_.hidden; i++) to[i] = from[i] * size / own;
    }
  });
}

// x: the mean of the first stream and of projections of the others of its size.
void Pass::Leave(Worker& worker) {
  const StreamsPlan& s = plan_.streams;
  RowSet& set = Set(worker);
  const size_t all = static_cast<size_t>(buffers_.streams_stride), stride = static_cast<size_t>(buffers_.hidden_stride);
  for (int j = 1; j < s.count; j++) {
    const Matrix& m = s.leave[j - 1];
    Small(worker, rows_, [&](int row) {
      std::copy_n(Stream(set, row, j), plan_.hidden, set.hidden.row(row));
      set.hidden.Pad(row, plan_.hidden);
      set.hidden.RoundRow(level_, row, plan_.hidden, RoundingOf(m));
    });
    const Output out{&m, &buffers_.brought[j * stride], all};
    Multiply(worker, -1, set.hidden, rows_, &out, 1);
  }
  Small(worker, rows_, [&](int row) {
    float* x = &set.x[row * stride];
    std::copy_n(Stream(set, row, 0), plan_.hidden, x);
    const float size = std::sqrt(MeanSquare(x, plan_.hidden));
    for (int j = 1; j < s.count; j++) {
      const float* from = &buffers_.brought[row * all + j * stride];
      const float own = std::sqrt(std::max(MeanSquare(from, plan_.hidden), kSmallest));
      for (int i = 0; i < plan_.hidden; i++) x[i] += from[i] * size / own;
    }
    for (int i = 0; i < plan_.hidden; i++) x[i] /= static_cast<float>(s.count);
  });
}

// y = matrix times tanh of the router of x; its numbers are padded to whole panels.
void Pass::Route(RowSet& set, int row, const float* x, const AltUpPlan& altup, const Matrix& matrix, float* y) {
  level_.rms_norm(x, altup.norm, set.hidden.row(row), plan_.hidden, plan_.eps);
  set.hidden.Pad(row, plan_.hidden);
  alignas(64) float routed[kBlock] = {};
  const Span* spans = set.hidden.spans() + static_cast<size_t>(row) * set.hidden.row_spans();
  level_.product(Product{&altup.router, spans, set.hidden.row_spans(), 1, routed, kBlock, 0, 1, 0,
                         Spans(altup.router.columns), exact_});
  for (int j = 0; j < plan_.streams.count; j++) routed[j] = std::tanh(routed[j]);
  const Span span{routed, nullptr, nullptr, nullptr};
  const size_t outputs = static_cast<size_t>(matrix.rows);
  level_.product(Product{&matrix, &span, 1, 1, y, outputs, 0, matrix.rows / kLanes, 0, 1, exact_});
}

void Pass::Predict(Worker& worker, int index) {
  const AltUpPlan& a = plan_.layers[index].altup;
  const StreamsPlan& s = plan_.streams;
  RowSet& set = Set(worker);
  const size_t stride = static_cast<size_t>(buffers_.hidden_stride);
  Small(worker, rows_, [&](int row) {
    alignas(64) float coefs[kMostStreams * kMostStreams];
    float* active = Stream(set, row, s.active);
    Route(set, row, active, a, a.prediction, coefs);
    level_.mix(Stream(set, row, 0), stride, s.count, coefs, plan_.hidden);
    std::copy_n(active, plan_.hidden, &set.x[row * stride]);
  });
}

// What the layer made of its stream changes all; then x is what the token's vector meets.
void Pass::Correct(Worker& worker, int index) {
  const AltUpPlan& a = plan_.layers[index].altup;
  const StreamsPlan& s = plan_.streams;
  RowSet& set = Set(worker);
  const size_t stride = static_cast<size_t>(buffers_.hidden_stride);
  Small(worker, rows_, [&](int row) {
    alignas(64) float coefs[kLanes];
    float* x = &set.x[row * stride];
    Route(set, row, x, a, a.correction, coefs);
    for (int j = 0; j < s.count; j++) coefs[j] += 1;
    level_.correct(Stream(set, row, 0), stride, s.count, s.active, x, coefs, plan_.hidden);
    const float* active = Stream(set, row, s.active);
    for (int i = 0; i < plan_.hidden; i++) x[i] = active[i] * a.scale[i];
  });
}

void Pass::Laurel(Worker& worker, int index) {
  const LaurelPlan& l = plan_.layers[index].laurel;
  RowSet& set = Set(worker);
  const size_t low = static_cast<size_t>(buffers_.most_rank);
  const Output left{&l.left, buffers_.low.data(), low};
  Multiply(worker, -1, set.hidden, rows_, &left, 1);
  Small(worker, rows_, [&](int row) {
    std::copy_n(&buffers_.low[row * low], l.rank, set.low.row(row));
    set.low.Pad(row, l.rank);
    set.low.RoundRow(level_, row, l.rank, RoundingOf(l.right));
  });
  const Output right{&l.right, buffers_.laurel.data(), static_cast<size_t>(buffers_.hidden_stride)};
  Multiply(worker, -1, set.low, rows_, &right, 1);
}

// What attention read is still in set.hidden.
void Pass::JoinLaurel(RowSet& set, int row, const LaurelPlan& laurel) {
  const size_t at = row * static_cast<size_t>(buffers_.hidden_stride);
  float* x = &set.x[at];
  const float* read = set.hidden.row(row);
  for (int i = 0; i < plan_.hidden; i++) x[i] += read[i];
  level_.add_rms_norm(x, &buffers_.laurel[at], laurel.norm, plan_.hidden, plan_.eps);
  for (int i = 0; i < plan_.hidden; i++) x[i] *= 0.70710678f;
}

}  // namespace gemma
