// Vectors that tokens have for each layer (per-layer embeddings).
#include "pass.h"

#include <algorithm>

namespace gemma {

// A row of the stream itself as what matrices read.
void Pass::ReadFloats(RowSet& set, int row, int rounding) {
  std::copy_n(&set.x[row * static_cast<size_t>(buffers_.hidden_stride)], plan_.hidden, set.hidden.row(row));
  set.hidden.Pad(row, plan_.hidden);
  set.hidden.RoundRow(level_, row, plan_.hidden, rounding);
}

void Pass::Vectors(Worker& worker) {
  const VectorsPlan& v = plan_.vectors;
  RowSet& set = Set(worker);
  Small(worker, rows_, [&](int row) { ReadFloats(set, row, RoundingOf(v.projection)); });
  const size_t stride = static_cast<size_t>(buffers_.vectors_stride);
  const Output out{&v.projection, buffers_.vectors.data(), stride};
  Multiply(worker, -1, set.hidden, rows_, &out, 1);
  const int layers = static_cast<int>(plan_.layers.size());
  worker.Each(rows_ * layers, [&](int unit) {
    const int row = unit / layers, begin = unit % layers * v.size, id = tokens_[row].id;
    float* y = &buffers_.vectors[row * stride + begin];
    for (int i = 0; i < v.size; i++) y[i] *= v.projection_factor;
    level_.rms_norm(y, v.norm, y, v.size, plan_.eps);
    float own[kLanes];
    for (int i = 0; i < v.size; i += kLanes) {
      ReadRow(v.table, id < v.table.rows ? id : 0, begin + i, kLanes, v.table_factor, own);
      for (int j = 0; j < kLanes; j++) y[i + j] = (y[i + j] + own[j]) * v.factor;
    }
  });
}

void Pass::AddVector(Worker& worker, int index) {
  const LayerPlan& l = plan_.layers[index];
  const AddedPlan& a = l.added;
  RowSet& set = Set(worker);
  const int size = plan_.vectors.size;
  const size_t stride = static_cast<size_t>(buffers_.hidden_stride), wide = static_cast<size_t>(buffers_.wide_stride);
  Small(worker, rows_, [&](int row) { ReadFloats(set, row, RoundingOf(a.gate)); });
  const Output gate{&a.gate, buffers_.gate.data(), wide};
  Multiply(worker, -1, set.hidden, rows_, &gate, 1);
  Small(worker, rows_, [&](int row) {
    const float* vector = &buffers_.vectors[row * static_cast<size_t>(buffers_.vectors_stride) + index * size];
    level_.gated(&buffers_.gate[row * wide], vector, set.wide.row(row), size, plan_.activation);
    set.wide.Pad(row, size);
    set.wide.RoundRow(level_, row, size, RoundingOf(a.projection));
  });
  const Output out{&a.projection, buffers_.out.data(), stride};
  Multiply(worker, -1, set.wide, rows_, &out, 1);
  if (plan_.streams.count != 0) {
    Small(worker, rows_, [&](int row) {  // to all streams but the first
      float* y = set.hidden.row(row);
      level_.rms_norm(&buffers_.out[row * stride], a.norm, y, plan_.hidden, plan_.eps);
      for (int j = 1; j < plan_.streams.count; j++) {
        float* s = Stream(set, row, j);
        for (int i = 0; i < plan_.hidden; i++) s[i] += y[i];
      }
    });
    return;
  }
  Small(worker, rows_, [&](int row) {
    level_.add_rms_norm(&set.x[row * stride], &buffers_.out[row * stride], a.norm, plan_.hidden, plan_.eps);
    Scale(set, row, l.scalar);
  });
}

}  // namespace gemma
