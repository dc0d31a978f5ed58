// Experts beside the MLP of a layer.
#include "pass.h"

#include <algorithm>
#include <cmath>

namespace gemma {

// The experts of a row by its scores, and their weights.
void Pass::Choose(Routing& routing, int row, const ExpertsPlan& e) {
  float* scores = &buffers_.scores[static_cast<size_t>(row) * buffers_.most_experts];
  int* chosen = &routing.chosen[static_cast<size_t>(row) * e.chosen];
  float* weights = &routing.weights[static_cast<size_t>(row) * e.chosen];
  for (int i = 0; i < e.chosen; i++) {
    int best = -1;
    for (int k = 0; k < e.count; k++) {
      const bool taken = std::find(chosen, chosen + i, k) != chosen + i;
      if (!taken && (best < 0 || scores[k] > scores[best])) best = k;
    }
    chosen[i] = best;
  }
  float sum = 0;
  for (int i = 0; i < e.chosen; i++) sum += weights[i] = std::exp(scores[chosen[i]] - scores[chosen[0]]);
  for (int i = 0; i < e.chosen; i++) weights[i] = weights[i] / sum * e.scales[chosen[i]];
}

// Brings rows of one expert together.
void Pass::Order(RowSet& set, const ExpertsPlan& e) {
  Routing& r = set.routing;
  const int runs = rows_ * e.chosen, spans = set.hidden.row_spans();
  std::fill(r.begins.begin(), r.begins.end(), 0);
  for (int i = 0; i < runs; i++) r.begins[r.chosen[i] + 1]++;
  r.jobs.clear();
  for (int k = 0; k < e.count; k++) {
    if (r.begins[k + 1] != 0) r.jobs.push_back(Routing::Job{k, r.begins[k], r.begins[k + 1]});
    r.begins[k + 1] += r.begins[k];
  }
  for (int i = 0; i < runs; i++) {
    const int place = r.places[i] = r.begins[r.chosen[i]]++;
    std::copy_n(set.hidden.spans() + static_cast<size_t>(i / e.chosen) * spans, spans,
                r.spans.begin() + static_cast<size_t>(place) * spans);
  }
}

void Pass::MultiplyEach(Worker& worker, const Routing& routing, const Matrix& all, int rows, const Span* spans,
                        int row_spans, float* y, size_t stride) {
  const int jobs = static_cast<int>(routing.jobs.size()), panels = rows / kLanes;
  const int wanted = std::max(1, worker.count() * kUnits / jobs);  // pieces of each
  const int step = worker.count() == 1 ? panels : std::max(4, ((panels + wanted - 1) / wanted + 3) / 4 * 4);
  const int pieces = (panels + step - 1) / step;
  worker.Each(jobs * pieces, [&](int unit) {
    const Routing::Job& job = routing.jobs[unit / pieces];
    const Matrix m = RowsOf(all, job.expert * rows, rows);
    const int begin = unit % pieces * step, end = std::min(panels, begin + step);
    level_.product(Product{&m, spans + static_cast<size_t>(job.first) * row_spans, row_spans, job.count,
                           y + job.first * stride, stride, begin, end, 0, Spans(m.columns), exact_});
  });
}

// Behind the MLP, whose result is in `out`: what both make together goes to set.hidden.
void Pass::Experts(Worker& worker, int index) {
  const ExpertsPlan& e = plan_.layers[index].experts;
  RowSet& set = Set(worker);
  Routing& r = set.routing;
  Small(worker, rows_, [&](int row) { Norm(set, row, e.router_norm, RoundingOf(e.router)); });
  const Output scores{&e.router, buffers_.scores.data(), static_cast<size_t>(buffers_.most_experts)};
  Multiply(worker, -1, set.hidden, rows_, &scores, 1);
  Small(worker, rows_, [&](int row) {
    Choose(r, row, e);
    Norm(set, row, e.norm, RoundingOf(e.gate_up));
  });
  Small(worker, 1, [&](int) { Order(set, e); });
  const size_t both = static_cast<size_t>(2) * e.width, stride = static_cast<size_t>(buffers_.hidden_stride);
  MultiplyEach(worker, r, e.gate_up, 2 * e.width, r.spans.data(), set.hidden.row_spans(), buffers_.expert_up.data(),
               both);
  Small(worker, rows_ * e.chosen, [&](int run) {
    const float* gate = &buffers_.expert_up[run * both];
    level_.gated(gate, gate + e.width, r.inner.row(run), e.width, plan_.activation);
    r.inner.Pad(run, e.width);
    r.inner.RoundRow(level_, run, e.width, RoundingOf(e.down));
  });
  MultiplyEach(worker, r, e.down, plan_.hidden, r.inner.spans(), r.inner.row_spans(), buffers_.expert_out.data(),
               stride);
  Small(worker, rows_, [&](int row) {
    float *sum = set.wide.row(row), *y = set.hidden.row(row);
    std::fill_n(sum, plan_.hidden, 0.0f);
    for (int i = row * e.chosen; i < (row + 1) * e.chosen; i++) {
      const float weight = r.weights[i];
      const float* one = &buffers_.expert_out[r.places[i] * stride];
      for (int k = 0; k < plan_.hidden; k++) sum[k] += weight * one[k];
    }
    level_.rms_norm(&buffers_.out[row * stride], e.dense_norm, y, plan_.hidden, plan_.eps);
    level_.add_rms_norm(y, sum, e.post_norm, plan_.hidden, plan_.eps);
  });
}

}  // namespace gemma
