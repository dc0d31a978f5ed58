#include "screening.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace gemma {
namespace {

constexpr int kTogether = 16;  // rows that are screened together
constexpr size_t kUnitBytes = 256 << 10;  // of high halves in a piece, about
// Of a half of a code that is as likely any of 0 to 15: its mean, half its variance, and how far it is from the mean at most.
constexpr float kMean = 7.5f, kHalfVariance = 255.0f / 24, kFarthest = 7.5f;
// A ceiling is a sum in float32, and must not be too low: 2^-10 of the farthest is far more than what its rounding costs.
constexpr float kSlack = 1 + 1.0f / 1024;

}  // namespace

int Screening::BinOf(float distance) {
  uint32_t bits;
  std::memcpy(&bits, &distance, 4);
  return std::clamp(static_cast<int>(bits >> (23 - kSteps)) - kLeast, 0, kBins - 1);
}

void Screening::Grow(const Matrix& m, int rows) {
  each_ = (m.rows + kPart - 1) / kPart;
  panels_ = static_cast<size_t>(m.rows) / kLanes;
  const size_t n = static_cast<size_t>(rows), groups = m.group == 0 ? 1 : static_cast<size_t>(m.columns / m.group);
  if (parts_.size() < n * each_) parts_.resize(n * each_);
  tokens_.resize(n);
  screened_.resize(n);
  codes_.Grow(n * m.columns);
  bytes_.Grow(n * m.columns * 2);
  sums_.Grow(n * groups * 3);
  ceilings_.Grow(n * m.rows);
  done_.Grow(n * panels_);
}

// A row's codes in their order, and its sums.
void Screening::Prepare(const Matrix& m, const Span* spans, int row) {
  const int size = m.group == 0 ? m.columns : m.group, groups = m.columns / size;
  int16_t* codes = &codes_[static_cast<size_t>(row) * m.columns];
  int8_t* high = &bytes_[static_cast<size_t>(row) * m.columns * 2];
  int8_t* low = high + m.columns;
  float* middle = &sums_[static_cast<size_t>(row) * groups * 3];
  float *spread = middle + groups, *most = spread + groups;
  for (int g = 0; g < groups; g++) {
    double sum = 0, squares = 0, magnitudes = 0;
    for (int k = g * size; k < (g + 1) * size; k++) {
      const Span& span = spans[k / kSpan];
      const float scale = *span.scale, inverse = scale > 0 ? 1 / scale : 0;
      // As Rows::Round has it.
      const float code = std::nearbyint(span.values[k % kSpan] * inverse);
      codes[k] = std::isnan(code) ? 0 : static_cast<int16_t>(std::clamp<float>(code, -kCodeMax, kCodeMax));
      high[k] = static_cast<int8_t>((codes[k] + 64) >> 7);
      low[k] = static_cast<int8_t>(codes[k] - 128 * high[k]);
      const double x = static_cast<double>(codes[k]) * scale;
      sum += x;
      squares += x * x;
      magnitudes += std::fabs(x);
    }
    middle[g] = static_cast<float>(kMean * sum);
    spread[g] = static_cast<float>(kHalfVariance * squares);
    most[g] = static_cast<float>(kFarthest * kSlack * magnitudes);
  }
  screened_[row] = Screened{spans, codes, high, low, middle, spread, most};
}

void Screening::Count(const float* logits, int begin, int end, float largest, Part* part) {
  uint16_t counts[4][kBins] = {};  // apart, so that none waits for the one before
  for (int i = begin; i < end; i++) counts[i % 4][BinOf(largest - logits[i])]++;
  for (int b = 0; b < kBins; b++)
    part->counts[b] = static_cast<uint16_t>(counts[0][b] + counts[1][b] + counts[2][b] + counts[3][b]);
}

// Which bins of a token are taken, and of the last one how many of each part.
void Screening::Choose(int row, int candidates) {
  int counts[kBins] = {};
  for (int p = 0; p < each_; p++)
    for (int b = 0; b < kBins; b++) counts[b] += PartOf(row, p).counts[b];
  int bin = 0, left = candidates;
  while (bin + 1 < kBins && counts[bin] < left) left -= counts[bin++];
  tokens_[row].bin = bin;
  for (int p = 0; p < each_; p++) {
    Part& part = PartOf(row, p);
    part.take = std::min<int>(left, part.counts[bin]);
    left -= part.take;
  }
}

// Candidates of a part, in their order: how many.
int Screening::Listed(const float* logits, int begin, int end, const Token& token, int take, int32_t* list) {
  int n = 0, kept = 0;
  // Distances below this are in the bins that are taken; all are where the last bin is.
  float beyond = std::numeric_limits<float>::infinity();
  if (token.bin + 1 < kBins) {
    const uint32_t bits = static_cast<uint32_t>(token.bin + 1 + kLeast) << (23 - kSteps);
    std::memcpy(&beyond, &bits, 4);
  }
  for (int i = begin; i < end; i++) {
    list[n] = i;
    n += !(token.largest - logits[i] >= beyond);
  }
  for (int i = 0; i < n; i++) {
    const int output = list[i];
    if (BinOf(token.largest - logits[output]) == token.bin && take-- <= 0) continue;
    list[kept++] = output;
  }
  return kept;
}

// Reads the candidates of a part.
void Screening::Refine(const Kernels& level, const Matrix& m, int row, int begin, int end, float* logits, Part* part) {
  int32_t list[kPart];
  part->refined = Listed(logits, begin, end, tokens_[row], part->take, list);
  level.refine(m, screened_[row], list, part->refined, logits);
  uint16_t* done = &done_[row * panels_];
  std::fill(done + begin / kLanes, done + (end + kLanes - 1) / kLanes, static_cast<uint16_t>(0));
  part->best = -std::numeric_limits<float>::infinity();
  for (int i = 0; i < part->refined; i++) {
    const int output = list[i];
    done[output / kLanes] = static_cast<uint16_t>(done[output / kLanes] | 1 << output % kLanes);
    part->best = std::max(part->best, logits[output]);
  }
}

// Reads what is not yet read whole, and may be the largest of all.
void Screening::Prove(const Kernels& level, const Matrix& m, int row, int begin, int end, float* logits, Part* part) {
  const float best = tokens_[row].best;
  const float* ceilings = &ceilings_[row * static_cast<size_t>(m.rows)];
  const uint16_t* done = &done_[row * panels_];
  int32_t list[kPart];
  int all = 0, n = 0;
  for (int i = begin; i < end; i++) {
    list[all] = i;
    all += !(ceilings[i] < best);
  }
  for (int i = 0; i < all; i++)
    if ((done[list[i] / kLanes] >> list[i] % kLanes & 1) == 0) list[n++] = list[i];
  level.refine(m, screened_[row], list, n, logits);
  part->more = n;
}

void Screening::Run(Worker& worker, const Kernels& level, const Matrix& m, const Span* spans, int row_spans, int all,
                    int vocabulary, int candidates, float* logits) {
  const size_t stride = static_cast<size_t>(m.rows);
  for (int first = 0; first < all; first += kTogether, logits += kTogether * stride) {
    const int rows = std::min(kTogether, all - first);
    Grow(m, rows);
    worker.Each(rows, [&](int row) { Prepare(m, spans + static_cast<size_t>(first + row) * row_spans, row); });
    const int panels = static_cast<int>(panels_);
    const int step = std::max<int>(4, static_cast<int>(kUnitBytes / PanelBytes(m.form, m.columns)) / 4 * 4);
    worker.Each((panels + step - 1) / step, [&](int unit) {
      level.screen(Screen{&m, screened_.data(), rows, logits, ceilings_.data(), stride, unit * step,
                          std::min(panels, (unit + 1) * step)});
    });
    // Parts come first, rows second: what rows read of a part lies near.
    const auto each = [&](const auto& f) {
      worker.Each(each_ * rows, [&](int unit) {
        const int row = unit % rows, part = unit / rows, begin = part * kPart;
        f(row, logits + row * stride, begin, std::min(vocabulary, begin + kPart), PartOf(row, part));
      });
    };
    each([&](int, float* y, int begin, int end, Part& part) {
      const int whole = (end - begin) / kLanes * kLanes;
      part.largest = level.largest(y + begin, whole);
      for (int i = begin + whole; i < end; i++) part.largest = std::max(part.largest, y[i]);
    });
    for (int row = 0; row < rows; row++) {
      tokens_[row].largest = PartOf(row, 0).largest;
      for (int p = 1; p < each_; p++) tokens_[row].largest = std::max(tokens_[row].largest, PartOf(row, p).largest);
    }
    each([&](int row, float* y, int begin, int end, Part& part) { Count(y, begin, end, tokens_[row].largest, &part); });
    worker.Each(rows, [&](int row) { Choose(row, candidates); });
    each([&](int row, float* y, int begin, int end, Part& part) { Refine(level, m, row, begin, end, y, &part); });
    for (int row = 0; row < rows; row++) {
      tokens_[row].best = PartOf(row, 0).best;
      for (int p = 1; p < each_; p++) tokens_[row].best = std::max(tokens_[row].best, PartOf(row, p).best);
    }
    each([&](int row, float* y, int begin, int end, Part& part) { Prove(level, m, row, begin, end, y, &part); });
    for (int row = 0; row < rows; row++) {
      uint64_t more = 0;
      for (int p = 0; p < each_; p++) {
        counts_.rows += PartOf(row, p).refined;
        more += PartOf(row, p).more;
      }
      counts_.tokens++;
      counts_.rows += more;
      counts_.more += more;
      counts_.proofs += more != 0;
    }
  }
}

}  // namespace gemma
