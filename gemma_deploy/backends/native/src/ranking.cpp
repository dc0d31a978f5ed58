#include "ranking.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace gemma {
namespace {

constexpr int kPart = 8192;   // logits that are looked at by one thread: sums do not depend on how many there are
constexpr int kGlance = 128;  // logits that are looked at one by one only where the largest of them may count

}  // namespace

void Ranking::Look(const Kernels& level, const float* logits, int begin, int end, int top, bool sum, Part* part) {
  const int n = end - begin, whole = n / kLanes * kLanes;
  float largest = level.largest(logits + begin, whole);
  for (int i = begin + whole; i < end; i++) largest = std::max(largest, logits[i]);
  part->largest = largest;
  if (sum) {
    part->sum = level.sum_exp(logits + begin, whole, largest);
    for (int i = begin + whole; i < end; i++) part->sum += std::exp(logits[i] - largest);
  }
  std::vector<One>& best = part->best;
  best.clear();
  if (top == 0) return;
  // A heap whose first is the least of the best.
  for (int at = begin; at < end; at += kGlance) {
    const int stop = std::min(end, at + kGlance);
    const bool full = static_cast<int>(best.size()) == top;
    if (full && stop - at == kGlance && level.largest(logits + at, kGlance) <= best.front().logit) continue;
    for (int i = at; i < stop; i++) {
      const One one{logits[i], i};
      if (static_cast<int>(best.size()) == top) {
        if (!Before(one, best.front())) continue;
        std::pop_heap(best.begin(), best.end(), Before);
        best.back() = one;
      } else {
        best.push_back(one);
      }
      std::push_heap(best.begin(), best.end(), Before);
    }
  }
}

void Ranking::Join(const Ranks& ranks, const Part* parts, int count, size_t row) {
  if (ranks.log_sums != nullptr) {
    float largest = parts[0].largest;
    for (int i = 1; i < count; i++) largest = std::max(largest, parts[i].largest);
    double sum = 0;
    for (int i = 0; i < count; i++) sum += parts[i].sum * std::exp(static_cast<double>(parts[i].largest) - largest);
    ranks.log_sums[row] = static_cast<float>(largest + std::log(sum));
  }
  if (ranks.top == 0) return;
  std::vector<One> all;
  for (int i = 0; i < count; i++) all.insert(all.end(), parts[i].best.begin(), parts[i].best.end());
  std::partial_sort(all.begin(), all.begin() + ranks.top, all.end(), Before);
  for (int i = 0; i < ranks.top; i++) {
    if (ranks.ids != nullptr) ranks.ids[row * ranks.top + i] = all[i].id;
    if (ranks.logits != nullptr) ranks.logits[row * ranks.top + i] = all[i].logit;
  }
}

void Ranking::Rank(Worker& worker, const Kernels& level, const float* logits, int rows, size_t stride, int vocabulary,
                   const Ranks& ranks, size_t first) {
  const int each = (vocabulary + kPart - 1) / kPart;
  if (parts_.size() < static_cast<size_t>(rows) * each) parts_.resize(static_cast<size_t>(rows) * each);
  if (ranks.top != 0 || ranks.log_sums != nullptr) {
    worker.Each(rows * each, [&](int unit) {
      const int begin = unit % each * kPart, end = std::min(vocabulary, begin + kPart);
      Look(level, logits + unit / each * stride, begin, end, ranks.top, ranks.log_sums != nullptr, &parts_[unit]);
    });
    worker.Each(rows, [&](int row) { Join(ranks, &parts_[static_cast<size_t>(row) * each], each, first + row); });
  }
  if (ranks.asked_logits == nullptr) return;
  for (int row = 0; row < rows; row++)
    ranks.asked_logits[first + row] = logits[row * stride + ranks.asked[first + row]];
}

}  // namespace gemma
