#include "pass.h"

#include <algorithm>
#include <cmath>

namespace gemma {
namespace {

constexpr int kBlockRows = 16;  // rows that attend together
constexpr int kAdaptedRows = 64;  // rows that read an adapter together
constexpr size_t kUnitBytes = 512 << 10;  // of weights that few rows read in a piece, at most

void Times(float* x, const float* factors, int n) {
  for (int i = 0; i < n; i++) x[i] *= factors[i];
}

}  // namespace

void Pass::Divide() {
  for (int r = 0; r < rows_; r++) {
    if (blocks_.empty() || blocks_.back().count == kBlockRows ||
        tokens_[blocks_.back().first].cache != tokens_[r].cache)
      blocks_.push_back(Rows{r, 0});
    blocks_.back().count++;
    const Adapter* adapter = tokens_[r].cache->adapter();
    if (adapter == nullptr) continue;
    const bool new_one = adapted_.empty() || adapted_.back().adapter != adapter ||
                         adapted_.back().first + adapted_.back().count != r || adapted_.back().count == kAdaptedRows;
    if (new_one) adapted_.push_back(Adapted{adapter, r, 0});
    adapted_.back().count++;
  }
}

void Pass::Multiply(Worker& worker, int layer, const Inputs& inputs, int rows, const Output* outputs, int count) {
  int panels = 0;
  for (int i = 0; i < count; i++) panels += outputs[i].matrix->rows / kLanes;
  const int share = (panels + worker.count() * kUnits - 1) / (worker.count() * kUnits);
  const Matrix& any = *outputs[0].matrix;
  const size_t most = rows > kBlockRows ? share : kUnitBytes / PanelBytes(any.form, any.columns);
  const int step = worker.count() == 1 ? panels : std::max(4, (std::min(share, static_cast<int>(most)) + 3) / 4 * 4);
  const int whole = (panels + step - 1) / step, low = layer < 0 ? 0 : static_cast<int>(adapted_.size()) * count;
  worker.Each(whole + low, [&](int unit) {
    if (unit >= whole) {
      const Adapted& some = adapted_[(unit - whole) / count];
      const int i = (unit - whole) % count;
      const LowRank& beside = some.adapter->at(layer, outputs[i].linear);
      if (beside.rank == 0) return;
      Inputs& made = buffers_.beside[i];
      const Span* from = inputs.spans() + static_cast<size_t>(some.first) * inputs.row_spans();
      return level_.product(Product{&beside.down, from, inputs.row_spans(), some.count, made.row(some.first),
                                    static_cast<size_t>(made.stride()), 0, beside.rank / kLanes, 0,
                                    Spans(beside.down.columns), false});
    }
    int begin = unit * step, left = std::min(step, panels - begin);
    for (int i = 0; i < count && left > 0; i++) {
      const Matrix& m = *outputs[i].matrix;
      const int all = m.rows / kLanes;
      if (begin >= all) {
        begin -= all;
        continue;
      }
      const int end = std::min(all, begin + left);
      level_.product(Product{&m, inputs.spans(), inputs.row_spans(), rows, outputs[i].y, outputs[i].stride, begin, end,
                             0, Spans(m.columns), exact_});
      left -= end - begin;
      begin = 0;
    }
  });
  if (low > 0) AddLow(worker, layer, outputs, count);
}

void Pass::AddLow(Worker& worker, int layer, const Output* outputs, int count) {
  worker.Each(static_cast<int>(adapted_.size()) * count, [&](int unit) {
    const Adapted& some = adapted_[unit / count];
    const Output& out = outputs[unit % count];
    const LowRank& beside = some.adapter->at(layer, out.linear);
    if (beside.rank == 0) return;
    const Inputs& made = buffers_.beside[unit % count];
    const Span* from = made.spans() + static_cast<size_t>(some.first) * made.row_spans();
    level_.product(Product{&beside.up, from, made.row_spans(), some.count, out.y + some.first * out.stride, out.stride, 0,
                           beside.up.rows / kLanes, 0, Spans(beside.up.columns), false, true});
  });
}

void Pass::Begin(Worker& worker) {
  const size_t half = static_cast<size_t>(buffers_.half_stride);
  worker.Each(rows_ * static_cast<int>(buffers_.frequencies.size()), [&](int unit) {
    const int row = unit % rows_, set = unit / rows_;
    float* cosines = &buffers_.cosines[set][row * half];
    float* sines = &buffers_.sines[set][row * half];
    for (int i = 0; i < buffers_.halves[set]; i++) {
      // transformers multiplies in float32.
      const float angle = static_cast<float>(tokens_[row].position) * buffers_.frequencies[set][i];
      cosines[i] = static_cast<float>(std::cos(static_cast<double>(angle)));
      sines[i] = static_cast<float>(std::sin(static_cast<double>(angle)));
    }
  });
  RowSet& set = Set(worker);
  Small(worker, rows_, [&](int row) {
    float* x = &set.x[row * static_cast<size_t>(buffers_.hidden_stride)];
    level_.read_row(plan_.table, tokens_[row].id, plan_.columns != nullptr ? 1.0f : plan_.embed_factor, x);
    if (plan_.columns != nullptr) Times(x, plan_.columns, plan_.hidden);
  });
  if (plan_.vectors.size != 0) Vectors(worker);
  if (plan_.streams.count != 0) Enter(worker);
}

void Pass::Layers(Worker& worker, int first, int last) {
  for (int i = first; i < last; i++) {
    const LayerPlan& l = plan_.layers[i];
    if (plan_.streams.count != 0) Predict(worker, i);
    Attention(worker, i);
    if (l.laurel.rank != 0) Laurel(worker, i);
    Mlp(worker, i);
    if (plan_.streams.count != 0) Correct(worker, i);
    if (plan_.vectors.size != 0) AddVector(worker, i);
  }
}

void Pass::Keep(const std::vector<int>& kept) {
  const auto move = [&](Array<float>& rows, int stride, int from, int to) {
    const size_t n = static_cast<size_t>(stride);
    if (from != to) std::copy_n(&rows[from * n], n, &rows[to * n]);
  };
  for (int to = 0; to < rows_; to++) {
    move(buffers_.set.x, buffers_.hidden_stride, kept[to], to);
    if (buffers_.streams_stride != 0) move(buffers_.set.streams, buffers_.streams_stride, kept[to], to);
    if (buffers_.vectors_stride != 0) move(buffers_.vectors, buffers_.vectors_stride, kept[to], to);
    for (auto& table : buffers_.cosines) move(table, buffers_.half_stride, kept[to], to);
    for (auto& table : buffers_.sines) move(table, buffers_.half_stride, kept[to], to);
  }
}

void Pass::Scale(RowSet& set, int row, float factor) {
  if (factor == 1.0f) return;
  float* x = &set.x[row * static_cast<size_t>(buffers_.hidden_stride)];
  for (int i = 0; i < plan_.hidden; i++) x[i] *= factor;
}

void Pass::Norm(RowSet& set, int row, const float* weight, int rounding) {
  level_.rms_norm(&set.x[row * static_cast<size_t>(buffers_.hidden_stride)], weight, set.hidden.row(row), plan_.hidden,
                  plan_.eps);
  set.hidden.Pad(row, plan_.hidden);
  set.hidden.RoundRow(level_, row, plan_.hidden, rounding);
}

void Pass::Attention(Worker& worker, int index) {
  const LayerPlan& l = plan_.layers[index];
  RowSet& set = Set(worker);
  const bool own = l.source == index;
  const int rounding = RoundingOf({&l.q, own ? &l.k : &l.q, l.laurel.rank != 0 ? &l.laurel.left : &l.q});
  Small(worker, rows_, [&](int row) { Norm(set, row, l.input_norm, rounding); });
  const Output outputs[] = {{&l.q, buffers_.q.data(), static_cast<size_t>(buffers_.q_stride), kQ},
                            {&l.k, buffers_.k.data(), static_cast<size_t>(buffers_.kv_stride), kK},
                            {&l.v, buffers_.v.data(), static_cast<size_t>(buffers_.kv_stride), kV}};
  Multiply(worker, index, set.hidden, rows_, outputs, !own ? 1 : l.has_v ? 3 : 2);
  Prepare(worker, index);
  if (alone_) {
    AttendAlone(worker, index);
  } else {
    AttendRows(worker, index);
  }
  const int size = l.heads * l.head_dim;
  if (RoundingOf(l.o) != kUnrounded) {
    const int spans = Spans(Padded(size));
    Small(worker, rows_ * spans, [&](int unit) { set.wide.Round(level_, unit / spans, unit % spans, size, RoundingOf(l.o)); });
  }
  const Output out{&l.o, buffers_.out.data(), static_cast<size_t>(buffers_.hidden_stride), kO};
  Multiply(worker, index, set.wide, rows_, &out, 1);
}

// Norms and turns queries; with several rows, keys and values are stored as well.
void Pass::Prepare(Worker& worker, int index) {
  const LayerPlan& l = plan_.layers[index];
  RowSet& set = Set(worker);
  const int turned = buffers_.set_of_layer[index], heads = l.heads + (alone_ || l.source != index ? 0 : l.kv_heads);
  Small(worker, rows_ * heads, [&](int unit) {
    const int row = unit / heads, head = unit % heads;
    if (head >= l.heads) return StoreKeyValue(index, row, head - l.heads);
    const size_t at = row * static_cast<size_t>(buffers_.q_stride) + static_cast<size_t>(head) * l.head_dim;
    const size_t angle = row * static_cast<size_t>(buffers_.half_stride);
    float* q = &set.q[at];
    if (l.q_norm != nullptr) {
      level_.rms_norm(&buffers_.q[at], l.q_norm, q, l.head_dim, plan_.eps);
    } else {
      std::copy_n(&buffers_.q[at], l.head_dim, q);
    }
    level_.rotate(q, &buffers_.cosines[turned][angle], &buffers_.sines[turned][angle], l.head_dim, l.factor);
    if (!codes_) return;
    if (l.key_factor != nullptr) Times(q, l.key_factor + head / (l.heads / l.kv_heads) * l.head_dim, l.head_dim);
    level_.round(set.heads.Point(row, head, q), l.head_dim);
  });
}

void Pass::StoreKeyValue(int index, int row, int head) {
  const LayerPlan& l = plan_.layers[index];
  const int position = tokens_[row].position, turned = buffers_.set_of_layer[index];
  const size_t at = row * static_cast<size_t>(buffers_.kv_stride) + static_cast<size_t>(head) * l.head_dim;
  const size_t angle = row * static_cast<size_t>(buffers_.half_stride);
  const Page page = tokens_[row].cache->PageOf(index, head, position / kPage);
  alignas(64) float x[512];  // ReadPlan holds head_dim to that
  const float* value = l.has_v ? &buffers_.v[at] : &buffers_.k[at];
  if (l.value_norm) {
    level_.rms_norm(value, nullptr, x, l.head_dim, plan_.eps);
    value = x;
  }
  if (codes_ && l.value_inverse != nullptr) {
    if (value != x) std::copy_n(value, l.head_dim, x);
    Times(x, l.value_inverse + head * l.head_dim, l.head_dim);
    value = x;
  }
  level_.store_value(page, position % kPage, value, l.head_dim);
  if (l.k_norm != nullptr) {
    level_.rms_norm(&buffers_.k[at], l.k_norm, x, l.head_dim, plan_.eps);
  } else {
    std::copy_n(&buffers_.k[at], l.head_dim, x);
  }
  level_.rotate(x, &buffers_.cosines[turned][angle], &buffers_.sines[turned][angle], l.head_dim, 1.0f);
  if (codes_ && l.key_inverse != nullptr) Times(x, l.key_inverse + head * l.head_dim, l.head_dim);
  level_.store_key(page, position % kPage, x, l.head_dim);
}

void Pass::Combine(const LayerPlan& l, size_t head, const float* best, const float* sums, const float* found, int pages,
                   float* y) {
  level_.combine(best, sums, found, pages, l.head_dim, y);
  if (codes_ && l.value_factor != nullptr) Times(y, l.value_factor + head / (l.heads / l.kv_heads) * l.head_dim, l.head_dim);
}

// One row: pages are shared out. Who has the last page of a head puts the new key and value there first.
void Pass::AttendAlone(Worker& worker, int index) {
  const LayerPlan& l = plan_.layers[index];
  RowSet& set = Set(worker);
  const int position = tokens_[0].position, first = FirstSeen(l.window, position) / kPage;
  const int pages = position / kPage + 1 - first;
  const int group = l.heads / l.kv_heads;
  worker.Each(l.kv_heads * pages, [&](int unit) {
    const int head = unit / pages, page = first + unit % pages;
    if (page == position / kPage && l.source == index) StoreKeyValue(index, 0, head);
    Query queries[64];
    for (int done = 0; done < group;) {
      int n = 0;
      for (; n < 64 && done < group; n++, done++) {
        const size_t h = static_cast<size_t>(head) * group + done, slot = h * pages + unit % pages;
        const int from = FirstSeen(l.window, position);
        queries[n] = Query{&set.q[h * l.head_dim], set.heads.at(0, h), std::max(0, from - page * kPage),
                           std::min(kPage - 1, position - page * kPage), &buffers_.best[slot], &buffers_.sums[slot],
                           &buffers_.found[slot * l.head_dim]};
      }
      level_.attend(gemma::Attention{tokens_[0].cache->PageOf(index, head, page), l.head_dim, l.cap, queries, n});
    }
  });
  for (int h = 0; h < l.heads; h++) {
    const size_t slot = static_cast<size_t>(h) * pages;
    Combine(l, h, &buffers_.best[slot], &buffers_.sums[slot], &buffers_.found[slot * l.head_dim], pages,
            set.wide.row(0) + static_cast<size_t>(h) * l.head_dim);
  }
  set.wide.Pad(0, l.heads * l.head_dim);
}

void Pass::AttendRows(Worker& worker, int index) {
  const LayerPlan& l = plan_.layers[index];
  const int blocks = static_cast<int>(blocks_.size());
  // The last blocks of a prompt see most: they come first.
  worker.Each(blocks * l.kv_heads, [&](int unit) {
    AttendBlock(worker.index(), index, blocks_[blocks - 1 - unit / l.kv_heads], unit % l.kv_heads);
  });
}

void Pass::AttendBlock(int thread, int index, const Rows& block, int kv_head) {
  const LayerPlan& l = plan_.layers[index];
  RowSet& set = buffers_.set;
  const int group = l.heads / l.kv_heads, queries = block.count * group;
  const int first = FirstSeen(l.window, tokens_[block.first].position) / kPage;
  const int pages = tokens_[block.first + block.count - 1].position / kPage + 1 - first;
  const size_t slots = static_cast<size_t>(queries) * pages;
  Array<float>& own = buffers_.own[thread];
  own.Grow(slots * (2 + l.head_dim));
  float* best = own.data() + slots * l.head_dim;
  float* sums = best + slots;
  std::vector<Query> all(queries);
  for (int p = 0; p < pages; p++) {
    const int base = (first + p) * kPage;
    for (int i = 0; i < queries; i++) {
      const int row = block.first + i / group, position = tokens_[row].position;
      const size_t head = static_cast<size_t>(kv_head) * group + i % group, slot = static_cast<size_t>(i) * pages + p;
      const int from = FirstSeen(l.window, position);
      all[i] = Query{&set.q[row * static_cast<size_t>(buffers_.q_stride) + head * l.head_dim], set.heads.at(row, head),
                     std::max(0, from - base), std::min(kPage - 1, position - base), best + slot, sums + slot, own.data() + slot * l.head_dim};
    }
    const Page page = tokens_[block.first].cache->PageOf(index, kv_head, first + p);
    level_.attend(gemma::Attention{page, l.head_dim, l.cap, all.data(), queries});
  }
  for (int i = 0; i < queries; i++) {
    const size_t head = static_cast<size_t>(kv_head) * group + i % group, slot = static_cast<size_t>(i) * pages;
    float* y = set.wide.row(block.first + i / group);
    Combine(l, head, best + slot, sums + slot, own.data() + slot * l.head_dim, pages, y + head * l.head_dim);
    if (kv_head == 0 && i % group == 0) set.wide.Pad(block.first + i / group, l.heads * l.head_dim);
  }
}

void Pass::Mlp(Worker& worker, int index) {
  const LayerPlan& l = plan_.layers[index];
  RowSet& set = Set(worker);
  const size_t stride = static_cast<size_t>(buffers_.hidden_stride), wide = static_cast<size_t>(buffers_.wide_stride);
  const auto add = [&](int row, const float* norm) {
    float* x = &set.x[row * stride];
    const float* y = &buffers_.out[row * stride];
    if (norm != nullptr) return level_.add_rms_norm(x, y, norm, plan_.hidden, plan_.eps);
    for (int i = 0; i < plan_.hidden; i++) x[i] += y[i];
  };
  Small(worker, rows_, [&](int row) {
    add(row, l.post_attention_norm);
    if (l.laurel.rank != 0) JoinLaurel(set, row, l.laurel);
    Norm(set, row, l.pre_mlp_norm, RoundingOf({&l.gate, &l.up}));
  });
  const Output outputs[] = {{&l.gate, buffers_.gate.data(), wide, kGate}, {&l.up, buffers_.up.data(), wide, kUp}};
  Multiply(worker, index, set.hidden, rows_, outputs, 2);
  if (l.sparse)
    worker.Each(rows_, [&](int row) {
      float* gate = &buffers_.gate[row * wide];
      level_.cut(gate, l.width, level_.cutoff(gate, l.width, l.quantile));
    });
  const int spans = Spans(Padded(l.width));
  Small(worker, rows_ * spans, [&](int unit) {
    const int row = unit / spans, span = unit % spans, begin = span * kSpan, n = std::min(kSpan, l.width - begin);
    const size_t at = row * wide + begin;
    if (n > 0) level_.gated(&buffers_.gate[at], &buffers_.up[at], set.wide.row(row) + begin, n, plan_.activation);
    if (span == spans - 1) set.wide.Pad(row, l.width);
    set.wide.Round(level_, row, span, l.width, RoundingOf(l.down));
  });
  const Output out{&l.down, buffers_.out.data(), stride, kDown};
  Multiply(worker, index, set.wide, rows_, &out, 1);
  if (l.experts.count != 0) Experts(worker, index);
  Small(worker, rows_, [&](int row) {
    if (l.experts.count == 0) {
      add(row, l.post_mlp_norm);
    } else {
      level_.add_rms_norm(&set.x[row * stride], set.hidden.row(row), l.post_mlp_norm, plan_.hidden, plan_.eps);
    }
    if (l.added.norm == nullptr) Scale(set, row, l.scalar);
  });
}

void Pass::Final(Worker& worker, float* normed) {
  if (plan_.streams.count != 0) Leave(worker);
  const size_t stride = static_cast<size_t>(buffers_.hidden_stride);
  worker.Each(rows_, [&](int i) {
    level_.rms_norm(&Set(worker).x[i * stride], plan_.final_norm, normed + static_cast<size_t>(i) * plan_.hidden,
                    plan_.hidden, plan_.eps);
  });
}

void Pass::Head(Worker& worker, const float* normed, int rows, float* logits, size_t stride) {
  Inputs& inputs = buffers_.set.hidden;
  worker.Each(rows, [&](int i) {
    std::copy_n(normed + static_cast<size_t>(i) * plan_.hidden, plan_.hidden, inputs.row(i));
    inputs.Pad(i, plan_.hidden);
    inputs.RoundRow(level_, i, plan_.hidden, RoundingOf(plan_.head));
  });
  if (plan_.candidates != 0 && !exact_) {
    buffers_.screening.Run(worker, level_, plan_.head, inputs.spans(), inputs.row_spans(), rows, plan_.vocabulary,
                           plan_.candidates, logits);
  } else {
    const Output out{&plan_.head, logits, stride};
    Multiply(worker, -1, inputs, rows, &out, 1);
  }
  if (plan_.cap == 0) return;
  const int panels = plan_.head.rows / kLanes, step = 1024, units = (panels + step - 1) / step;
  worker.Each(units * rows, [&](int unit) {
    const int begin = unit % units * step, n = std::min(step, panels - begin);
    level_.soft_cap(logits + unit / units * stride + static_cast<size_t>(begin) * kLanes, n * kLanes, plan_.cap);
  });
}

}  // namespace gemma
