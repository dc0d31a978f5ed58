#include "buffers.h"

#include <algorithm>

namespace gemma {
void Inputs::Grow(int rows, int columns) {
  stride_ = Padded(columns);
  row_spans_ = Spans(stride_);
  values_.Grow(static_cast<size_t>(rows) * stride_);
  scales_.Grow(static_cast<size_t>(rows) * row_spans_ * (kSpan / kSums));
  codes_.Grow(static_cast<size_t>(rows) * stride_ * 2);
  sums_.Grow(static_cast<size_t>(rows) * row_spans_ * (kSpan / kSums + 1));
  spans_.clear();
  for (int r = 0; r < rows; r++) {
    for (int s = 0; s < row_spans_; s++) {
      const size_t i = static_cast<size_t>(r) * row_spans_ + s, at = static_cast<size_t>(r) * stride_ + s * kSpan;
      spans_.push_back(Span{values_.data() + at, codes_.data() + 2 * at, scales_.data() + i * (kSpan / kSums),
                            sums_.data() + i * (kSpan / kSums + 1)});
    }
  }
}

void Inputs::Pad(int r, int columns) { std::fill(row(r) + columns, row(r) + Padded(columns), 0.0f); }

void Inputs::Round(const Kernels& level, int row, int span, int columns, int rounding) const {
  if (rounding == kUnrounded) return;
  const Span& all = spans_[static_cast<size_t>(row) * row_spans_ + span];
  const int inputs = std::min(Padded(columns) - span * kSpan, kSpan);
  rounding == 0 ? level.round(all, inputs) : level.round8(all, inputs, rounding);
}

void Inputs::RoundRow(const Kernels& level, int row, int columns, int rounding) const {
  for (int span = 0; span < Spans(Padded(columns)); span++) Round(level, row, span, columns, rounding);
}

void HeadCodes::Grow(int rows, int heads, int head_dim) {
  heads_ = heads;
  const size_t all = static_cast<size_t>(rows) * heads, sums = static_cast<size_t>(head_dim) / kSums + 1;
  scales_.Grow(all);
  codes_.Grow(all * 2 * Padded(head_dim));
  sums_.Grow(all * sums);
  spans_.clear();
  for (size_t i = 0; i < all; i++)
    spans_.push_back(Span{nullptr, codes_.data() + i * 2 * Padded(head_dim), scales_.data() + i, sums_.data() + i * sums});
}

Buffers::Buffers(const Plan& plan, int threads) : own(threads) {
  int q = 0, width = 0, kv = 0;
  for (const LayerPlan& layer : plan.layers) {
    q = std::max(q, layer.heads * layer.head_dim);
    most_heads = std::max(most_heads, layer.heads);
    most_head_dim = std::max(most_head_dim, layer.head_dim);
    kv = std::max(kv, layer.kv_heads * layer.head_dim);
    width = std::max(width, layer.width);
    half_stride = std::max(half_stride, layer.head_dim / 2);
    most_experts = std::max(most_experts, (layer.experts.count + kLanes - 1) / kLanes * kLanes);
    most_chosen = std::max(most_chosen, layer.experts.chosen);
    expert_width = std::max(expert_width, layer.experts.width);
    most_rank = std::max(most_rank, (layer.laurel.rank + kLanes - 1) / kLanes * kLanes);
    size_t same = 0;
    while (same < frequencies.size() && (frequencies[same] != layer.frequencies || halves[same] != layer.head_dim / 2)) same++;
    if (same == frequencies.size()) {
      frequencies.push_back(layer.frequencies);
      halves.push_back(layer.head_dim / 2);
      cosines.emplace_back();
      sines.emplace_back();
    }
    set_of_layer.push_back(static_cast<int>(same));
  }
  hidden_stride = Padded(plan.hidden);
  q_stride = Padded(q);
  streams_stride = plan.streams.count * hidden_stride;
  kv_stride = Padded(kv);
  wide_stride = std::max({q_stride, Padded(width), Padded(plan.vectors.size), hidden_stride});
  vectors_stride = plan.vectors.size * static_cast<int>(plan.layers.size());
}

void Buffers::Grow(const Plan& plan, int wanted) {
  if (wanted <= rows) return;
  rows = wanted;
  const size_t n = static_cast<size_t>(rows);
  set.x.Grow(n * hidden_stride);
  set.q.Grow(n * q_stride);
  set.heads.Grow(rows, most_heads, most_head_dim);
  set.hidden.Grow(rows, plan.hidden);
  set.wide.Grow(rows, wide_stride);
  set.streams.Grow(n * streams_stride);
  if (most_rank != 0) set.low.Grow(rows, most_rank);
  Routing& routing = set.routing;
  const size_t runs = n * most_chosen;
  routing.chosen.resize(runs);
  routing.weights.resize(runs);
  routing.places.resize(runs);
  routing.spans.resize(runs * set.hidden.row_spans());
  routing.begins.resize(most_experts + 1);
  if (runs != 0) routing.inner.Grow(static_cast<int>(runs), expert_width);
  q.Grow(n * q_stride);
  k.Grow(n * kv_stride);
  v.Grow(n * kv_stride);
  out.Grow(n * hidden_stride);
  gate.Grow(n * wide_stride);
  up.Grow(n * wide_stride);
  vectors.Grow(n * vectors_stride);
  low.Grow(n * most_rank);
  laurel.Grow(most_rank == 0 ? 0 : n * hidden_stride);
  brought.Grow(n * streams_stride);
  scores.Grow(n * most_experts);
  expert_up.Grow(n * most_chosen * 2 * expert_width);
  expert_out.Grow(n * most_chosen * hidden_stride);
  for (auto& table : cosines) table.Grow(n * half_stride);
  for (auto& table : sines) table.Grow(n * half_stride);
}

void Buffers::GrowLow(int rows, int rank) {
  for (Inputs& one : beside) one.Grow(rows, rank);
}

void Buffers::GrowPages(const Plan& plan, int pages) {
  size_t heads = 0, numbers = 0;
  for (const LayerPlan& layer : plan.layers) {
    heads = std::max(heads, static_cast<size_t>(layer.heads));
    numbers = std::max(numbers, static_cast<size_t>(layer.heads) * layer.head_dim);
  }
  const size_t room = (static_cast<size_t>(pages) + 7) / 8 * 8;
  best.Grow(heads * room);
  sums.Grow(heads * room);
  found.Grow(numbers * room);
}

}  // namespace gemma
