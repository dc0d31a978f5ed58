// Single functions of a level behind a C ABI, for tests and measurements. Sizes are checked; pointers are not.
#include <cstring>
#include <memory>
#include <vector>

#include "levels.h"
#include "row_table.h"
#include "screening.h"

#define GEMMA_API extern "C" __attribute__((visibility("default")))

namespace gemma {
namespace {

// Rows of activations, rounded to 15 bits or to 8 in groups, that own their memory.
class Activations {
 public:
  Activations(const Kernels& level, const float* x, int count, int columns, int group = 0) {
    const int spans = Spans(columns);
    const size_t all = static_cast<size_t>(count) * spans;
    codes_.resize(all * kSpan * 2);
    scales_.resize(all * (kSpan / kSums));
    sums_.resize(all * (kSpan / kSums + 1));
    for (size_t i = 0; i < all; i++) {
      const int begin = static_cast<int>(i % spans) * kSpan;
      rows_.push_back(Span{x + i / spans * columns + begin, &codes_[i * kSpan * 2], &scales_[i * (kSpan / kSums)],
                           &sums_[i * (kSpan / kSums + 1)]});
      const int inputs = columns - begin < kSpan ? columns - begin : kSpan;
      group == 0 ? level.round(rows_.back(), inputs) : level.round8(rows_.back(), inputs, group);
    }
  }
  const Span* rows() const { return rows_.data(); }

 private:
  std::vector<int8_t> codes_;
  std::vector<float> scales_;
  std::vector<int32_t> sums_;
  std::vector<Span> rows_;
};

bool Grouped(int group) { return group == 0 || (group >= kSums && group <= kSpan && (group & (group - 1)) == 0); }

bool Fits(const Matrix& m) {
  const bool grouped = Grouped(m.group) && (m.group == 0 || m.columns % m.group == 0) && Grouped(m.input_group);
  return m.rows > 0 && m.rows % kLanes == 0 && m.columns > 0 && m.columns % (m.form >= kInt4 ? 128 : kBlock) == 0 &&
         m.form >= kFloat32 && m.form <= kPlanes && grouped;
}

}  // namespace
}  // namespace gemma

using gemma::Kernels;

GEMMA_API const char* gemma_levels() { return gemma::LevelNames(); }

// y [count, rows] = x [count, columns] times the matrix; 0 for success, 1 for an unknown level, 2 for sizes that no
// matrix has. `exact`: see kernels.h; `repeat` runs the product that often, for measurements.
GEMMA_API int gemma_op_product(const char* level, const gemma::Matrix* matrix, const float* x, int count, float* y,
                               int begin, int end, int exact, int repeat) {
  const Kernels* k = gemma::Level(level);
  if (k == nullptr) return 1;
  if (!gemma::Fits(*matrix) || count < 1 || begin < 0 || end > matrix->rows / gemma::kLanes || begin > end) return 2;
  if (matrix->form == gemma::kPlanes && exact == 0) return 2;  // gemma_op_screened
  const gemma::Activations a(*k, x, count, matrix->columns, matrix->input_group);
  const int spans = gemma::Spans(matrix->columns);
  for (int i = 0; i < repeat; i++)
    k->product(gemma::Product{matrix, a.rows(), spans, count, y, static_cast<size_t>(matrix->rows), begin, end, 0, spans, exact != 0});
  return 0;
}

// y [count, rows] = x [count, columns] times planes, screened, with so many threads; what was read: see gemma_screened.
GEMMA_API int gemma_op_screened(const char* level, const gemma::Matrix* matrix, const float* x, int count, float* y,
                                int vocabulary, int candidates, int threads, uint64_t* counts) {
  const Kernels* k = gemma::Level(level);
  if (k == nullptr) return 1;
  if (!gemma::Fits(*matrix) || matrix->form != gemma::kPlanes || count < 1) return 2;
  if (vocabulary > matrix->rows || vocabulary <= matrix->rows - gemma::kLanes || candidates < 1 || threads < 1) return 2;
  const gemma::Activations a(*k, x, count, matrix->columns);
  gemma::Pool pool(threads);
  gemma::Screening screening;
  pool.Run(0, [&](gemma::Worker& worker) {
    screening.Run(worker, *k, *matrix, a.rows(), gemma::Spans(matrix->columns), count, vocabulary, candidates, y);
  });
  const gemma::ScreenCounts found = screening.counts();
  const uint64_t all[] = {found.tokens, found.rows, found.proofs, found.more};
  std::memcpy(counts, all, sizeof all);
  return 0;
}

GEMMA_API int gemma_op_read_row(const char* level, const gemma::Matrix* matrix, int row, float factor, float* y) {
  const Kernels* k = gemma::Level(level);
  if (k == nullptr) return 1;
  if (!gemma::Fits(*matrix) || row < 0 || row >= matrix->rows) return 2;
  k->read_row(*matrix, row, factor, y);
  return 0;
}

// kind: 0 rms_norm(x, w), 1 x += rms_norm(y, w), 2 gated tanh (x gate, w up), 3 gated exact, 4 soft cap by eps,
// 5 rotate by cosines w and sines y, 6 cut what is below the mean and eps deviations off; 7 the largest and 8 the sum of
// exp(x - eps), in x[0]; the result is in x.
GEMMA_API int gemma_op_row(const char* level, int kind, float* x, const float* y, const float* w, int n, float eps) {
  const Kernels* k = gemma::Level(level);
  if (k == nullptr) return 1;
  if (n < 1 || n % (kind == 5 ? 32 : 16)) return 2;
  switch (kind) {
    case 0:
      k->rms_norm(x, w, x, n, eps);
      return 0;
    case 1:
      k->add_rms_norm(x, y, w, n, eps);
      return 0;
    case 2:
    case 3:
      k->gated(x, w, x, n, kind - 2);
      return 0;
    case 4:
      k->soft_cap(x, n, eps);
      return 0;
    case 5:
      k->rotate(x, w, y, n, eps);
      return 0;
    case 6:
      k->cut(x, n, k->cutoff(x, n, eps));
      return 0;
    case 7:
      x[0] = k->largest(x, n);
      return 0;
    case 8:
      x[0] = k->sum_exp(x, n, eps);
      return 0;
    default:
      return 2;
  }
}

// Streams x [count][n]: mixed by coefs [count][count], or corrected by coefs [count] towards y where that is not null.
GEMMA_API int gemma_op_streams(const char* level, float* x, int count, int active, const float* y, const float* coefs,
                               int n) {
  const Kernels* k = gemma::Level(level);
  if (k == nullptr) return 1;
  if (n < 1 || n % 16 || count < 1 || count > gemma::kMostStreams || active < 0 || active >= count) return 2;
  if (y == nullptr) {
    k->mix(x, static_cast<size_t>(n), count, coefs, n);
  } else {
    k->correct(x, static_cast<size_t>(n), count, active, y, coefs, n);
  }
  return 0;
}

// Numbers begin..begin + count of a row of a table whose rows lie one behind another.
GEMMA_API int gemma_op_table_row(const gemma::RowTable* table, int row, int begin, int count, float factor, float* y) {
  if (row < 0 || row >= table->rows || begin < 0 || count < 0 || begin > table->columns - count) return 2;
  gemma::ReadRow(*table, row, begin, count, factor, y);
  return 0;
}

// Attention of `count` queries [count, D] to positions first[i]..last[i] of keys and values [length, D], which are kept
// in pages of a form; y [count, D].
GEMMA_API int gemma_op_attend(const char* level, int form, const float* queries, const int* first, const int* last,
                              int count, const float* keys, const float* values, int length, int head_dim, float cap,
                              float* y) {
  const Kernels* k = gemma::Level(level);
  if (k == nullptr) return 1;
  const bool known = form == gemma::kFloat32 || form == gemma::kBFloat16 || form == gemma::kInt8;
  if (!known || count < 1 || length < 1 || head_dim < 32 || head_dim % 32 || head_dim > 512) return 2;
  const int pages = (length + gemma::kPage - 1) / gemma::kPage;
  const size_t bytes = gemma::PageBytes(form, head_dim), slots = static_cast<size_t>(count) * pages;
  std::vector<uint8_t> cache(bytes * pages);
  const auto page = [&](int p) { return gemma::PageAt(cache.data() + p * bytes, form, head_dim); };
  for (int i = 0; i < length; i++) {
    const size_t at = static_cast<size_t>(i) * head_dim;
    k->store_key(page(i / gemma::kPage), i % gemma::kPage, keys + at, head_dim);
    k->store_value(page(i / gemma::kPage), i % gemma::kPage, values + at, head_dim);
  }
  const gemma::Activations rounded(*k, queries, count, head_dim);
  std::vector<float> best(slots), sums(slots), found(slots * head_dim);
  for (int p = 0; p < pages; p++) {
    std::vector<gemma::Query> all;
    for (int i = 0; i < count; i++) {
      const int begin = first[i] - p * gemma::kPage, end = last[i] - p * gemma::kPage;
      const size_t slot = static_cast<size_t>(i) * pages + p;
      all.push_back(gemma::Query{queries + static_cast<size_t>(i) * head_dim, rounded.rows() + i, begin < 0 ? 0 : begin,
                                 end >= gemma::kPage ? gemma::kPage - 1 : end, &best[slot], &sums[slot],
                                 &found[slot * head_dim]});
    }
    k->attend(gemma::Attention{page(p), head_dim, cap, all.data(), count});
  }
  for (int i = 0; i < count; i++) {
    const size_t slot = static_cast<size_t>(i) * pages;
    k->combine(&best[slot], &sums[slot], &found[slot * head_dim], pages, head_dim,
               y + static_cast<size_t>(i) * head_dim);
  }
  return 0;
}
