#include "ranking.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace gemma {
namespace {

constexpr int kPart = 8192;   // logits that are looked at by one thread: sums do not depend on how many there are
constexpr int kGlance = 128;  // logits that are looked at one by one only where the largest of them counts

}  // namespace

void Ranking::Look(const Kernels& level, const float* logits, int begin, int end, bool sum, Part* part) {
  const int n = end - begin, whole = n / kLanes * kLanes;
  part->largest = -std::numeric_limits<float>::infinity();
  part->glances.clear();
  for (int at = begin; at < end; at += kGlance) {
    const int stop = std::min(end, at + kGlance), lanes = (stop - at) / kLanes * kLanes;
    float largest = level.largest(logits + at, lanes);
    for (int i = at + lanes; i < stop; i++) largest = std::max(largest, logits[i]);
    if (std::isnan(largest)) largest = -std::numeric_limits<float>::infinity();
    part->glances.push_back(One{largest, at});
    part->largest = std::max(part->largest, largest);
  }
  if (!sum) return;
  part->sum = level.sum_exp(logits + begin, whole, part->largest);
  for (int i = begin + whole; i < end; i++) part->sum += std::exp(logits[i] - part->largest);
}

void Ranking::Join(const Ranks& ranks, const float* logits, int vocabulary, const Part* parts, int count, size_t row) {
  if (ranks.log_sums != nullptr) {
    float largest = parts[0].largest;
    for (int i = 1; i < count; i++) largest = std::max(largest, parts[i].largest);
    double sum = 0;
    for (int i = 0; i < count; i++) sum += parts[i].sum * std::exp(static_cast<double>(parts[i].largest) - largest);
    const float none = std::numeric_limits<float>::quiet_NaN();
    ranks.log_sums[row] = std::isfinite(sum) && std::isfinite(largest) ? static_cast<float>(largest + std::log(sum)) : none;
  }
  if (ranks.top == 0) return;
  std::vector<One> glances, best;
  for (int i = 0; i < count; i++) glances.insert(glances.end(), parts[i].glances.begin(), parts[i].glances.end());
  // So many logits are not below the largest of as many glances: what is below the last of these does not count.
  const size_t top = static_cast<size_t>(ranks.top), last = std::min(top, glances.size()) - 1;
  std::nth_element(glances.begin(), glances.begin() + last, glances.end(), Before);
  const float least = top <= glances.size() ? glances[last].logit : -std::numeric_limits<float>::infinity();
  for (const One& glance : glances) {
    if (glance.logit < least) continue;
    for (int i = glance.id; i < std::min(vocabulary, glance.id + kGlance); i++)
      if (logits[i] >= least) best.push_back(One{logits[i], i});
  }
  best.resize(std::max(best.size(), top), One{-std::numeric_limits<float>::infinity(), 0});  // of logits that are none
  std::partial_sort(best.begin(), best.begin() + ranks.top, best.end(), Before);
  for (int i = 0; i < ranks.top; i++) {
    if (ranks.ids != nullptr) ranks.ids[row * ranks.top + i] = best[i].id;
    if (ranks.logits != nullptr) ranks.logits[row * ranks.top + i] = best[i].logit;
  }
}

void Ranking::Rank(Worker& worker, const Kernels& level, const float* logits, int rows, size_t stride, int vocabulary,
                   const Ranks& ranks, size_t first) {
  const int each = (vocabulary + kPart - 1) / kPart;
  if (parts_.size() < static_cast<size_t>(rows) * each) parts_.resize(static_cast<size_t>(rows) * each);
  if (ranks.top != 0 || ranks.log_sums != nullptr) {
    worker.Each(rows * each, [&](int unit) {
      const int begin = unit % each * kPart, end = std::min(vocabulary, begin + kPart);
      Look(level, logits + unit / each * stride, begin, end, ranks.log_sums != nullptr, &parts_[unit]);
    });
    worker.Each(rows, [&](int row) {
      const Part* parts = &parts_[static_cast<size_t>(row) * each];
      Join(ranks, logits + row * stride, vocabulary, parts, each, first + row);
    });
  }
  if (ranks.asked_logits == nullptr) return;
  for (int row = 0; row < rows; row++)
    ranks.asked_logits[first + row] = logits[row * stride + ranks.asked[first + row]];
}

}  // namespace gemma
