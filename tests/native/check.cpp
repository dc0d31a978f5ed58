// Compares every level that this processor has with sums in double precision: a program, so that an emulator can run it.
//
// Prints the levels that it looked at; exits with 1 where one is wrong.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "levels.h"

using namespace gemma;

namespace {

std::mt19937 random_numbers(7);
int failures = 0;

void Expect(const char* level, const std::string& what, double error, double limit) {
  if (error <= limit) return;
  std::printf("%s: %s is off by %.3g, limit %.3g\n", level, what.c_str(), error, limit);
  failures++;
}

std::vector<float> Normal(size_t n, float scale = 1) {
  std::normal_distribution<float> draw(0, scale);
  std::vector<float> x(n);
  for (float& v : x) v = draw(random_numbers);
  return x;
}

float Cut(float x) {  // to bfloat16, nearest even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16 << 16;
  std::memcpy(&x, &bits, 4);
  return x;
}

struct Packed {
  std::vector<uint8_t> panels;
  std::vector<float> scales;
  Matrix matrix{};
  std::vector<double> dense;
};

Packed Pack(int32_t form, int rows, int columns, int group, bool extreme, int inputs) {
  Packed p;
  const int groups = group == 0 ? 1 : columns / group, step = group == 0 ? columns : group;
  p.panels.resize(rows / kLanes * PanelBytes(form, columns));
  p.dense.resize(static_cast<size_t>(rows) * columns);
  std::uniform_real_distribution<float> draw(0.5f, 2);
  p.scales.resize(static_cast<size_t>(rows) * groups);
  for (float& s : p.scales) s = draw(random_numbers);
  const std::vector<float> values = Normal(p.dense.size());
  for (int n = 0; n < rows; n++) {
    uint8_t* panel = p.panels.data() + n / kLanes * PanelBytes(form, columns);
    const int lane = n % kLanes;
    for (int k = 0; k < columns; k++) {
      const size_t at = static_cast<size_t>(n) * columns + k;
      if (form == kInt8 || form == kInt4) {
        const int half = form == kInt8 ? 128 : 8;
        const int code = extreme ? -half : static_cast<int>(random_numbers() % (2 * half)) - half;
        const size_t scale = (static_cast<size_t>(n / kLanes) * groups + k / step) * kLanes + lane;
        p.dense[at] = code * static_cast<double>(p.scales[scale]);
        if (form == kInt8) {
          panel[static_cast<size_t>(k / 4) * 64 + lane * 4 + k % 4] = static_cast<uint8_t>(code + 128);
        } else {
          uint8_t& both = panel[static_cast<size_t>(k / 128) * 1024 + k % 64 / 4 * 64 + lane * 4 + k % 4];
          both = static_cast<uint8_t>(both | (code + 8) << (k % 128 < 64 ? 0 : 4));
        }
      } else if (form == kFloat32) {
        std::memcpy(panel + (static_cast<size_t>(k) * kLanes + lane) * 4, &values[at], 4);
        p.dense[at] = values[at];
      } else if (form == kFloat16) {  // every kind of number that it has: zeros, small ones, both signs
        const uint16_t half = static_cast<uint16_t>(random_numbers() % 0x7c00 | (random_numbers() % 2) << 15);
        const int exponent = half >> 10 & 31, mantissa = half & 1023;
        const double size = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
        std::memcpy(panel + (static_cast<size_t>(k) * kLanes + lane) * 2, &half, 2);
        p.dense[at] = half >> 15 ? -size : size;
      } else {
        const float cut = Cut(values[at]);
        uint32_t bits;
        std::memcpy(&bits, &cut, 4);
        const uint16_t half = static_cast<uint16_t>(bits >> 16);
        std::memcpy(panel + (static_cast<size_t>(k / 2) * 32 + lane * 2 + k % 2) * 2, &half, 2);
        p.dense[at] = cut;
      }
    }
  }
  p.matrix = Matrix{p.panels.data(), reinterpret_cast<const uint8_t*>(p.scales.data()), form, kFloat32, rows, columns, group, inputs};
  return p;
}

// `inputs`: of a group of activations of 8 bits; 0: they have 15.
void CheckProduct(const Kernels& k, int32_t form, int rows, int columns, int group, bool extreme, int inputs = 0) {
  const Packed p = Pack(form, rows, columns, group, extreme, inputs);
  const int count = 9, spans = Spans(columns);
  std::vector<float> x = Normal(static_cast<size_t>(count) * columns, 10);
  std::fill_n(x.begin(), columns, 0.0f);
  if (extreme) std::fill(x.begin() + columns, x.end(), -3.0f);
  std::vector<int8_t> codes(x.size() * 2);
  std::vector<float> scales(count * spans * (kSpan / kSums)), y(static_cast<size_t>(count) * rows);
  std::vector<int32_t> sums(static_cast<size_t>(count) * spans * (kSpan / kSums + 1));
  std::vector<Span> all;
  for (int i = 0; i < count * spans; i++) {
    const size_t at = static_cast<size_t>(i / spans) * columns + i % spans * kSpan;
    all.push_back(Span{x.data() + at, codes.data() + 2 * at, &scales[i * (kSpan / kSums)], &sums[i * static_cast<size_t>(kSpan / kSums + 1)]});
    const int wanted = std::min(kSpan, columns - i % spans * kSpan);
    inputs == 0 ? k.round(all.back(), wanted) : k.round8(all.back(), wanted, inputs);
  }
  const int panels = rows / kLanes;
  const size_t stride = static_cast<size_t>(rows);
  k.product(Product{&p.matrix, all.data(), spans, count, y.data(), stride, 0, panels, 0, spans, false});
  double worst = 0;
  for (int r = 0; r < count; r++) {
    for (int n = 0; n < rows; n++) {
      double sum = 0, size = 1e-30;
      for (int c = 0; c < columns; c++) {
        double v = x[static_cast<size_t>(r) * columns + c];
        if (form >= kInt8) {  // what the codes stand for
          const float scale = scales[(r * spans + c / kSpan) * (kSpan / kSums) + (inputs == 0 ? 0 : c % kSpan / inputs)];
          v = scale == 0 ? 0 : std::nearbyint(static_cast<float>(v) * (1 / scale)) * static_cast<double>(scale);
        }
        const double w = p.dense[static_cast<size_t>(n) * columns + c];
        sum += v * w;
        size += v * v * w * w;
      }
      worst = std::max(worst, std::fabs(y[static_cast<size_t>(r) * rows + n] - sum) / (std::sqrt(size) * std::sqrt(columns)));
    }
  }
  const std::string what = "product, form " + std::to_string(form) + ", " + std::to_string(rows) + " x " +
                           std::to_string(columns) + ", group " + std::to_string(group) + ", inputs " + std::to_string(inputs) +
                           (extreme ? ", extreme" : "");
  Expect(k.name, what, worst, 5e-7);  // 3.7e-7 seen, of plain C++ in groups of 32
  // Alone, and span by span, a row gives the same bits.
  std::vector<float> alone(rows), pieces(y.size());
  k.product(Product{&p.matrix, all.data() + 4 * spans, spans, 1, alone.data(), stride, 0, panels, 0, spans, false});
  for (int s = 0; s < spans; s++)
    k.product(Product{&p.matrix, all.data() + s, spans, count, pieces.data(), stride, 0, panels, s, s + 1, false});
  Expect(k.name, what + ", alone", std::memcmp(alone.data(), &y[4 * stride], alone.size() * 4) != 0, 0);
  Expect(k.name, what + ", in pieces", std::memcmp(pieces.data(), y.data(), y.size() * 4) != 0, 0);
  if (form >= kInt8 && !extreme) {  // float32 sums of equal terms lose more, as they do anywhere
    k.product(Product{&p.matrix, all.data(), spans, count, y.data(), stride, 0, panels, 0, spans, true});
    double exact = 0;
    for (int r = 0; r < count; r++) {
      for (int n = 0; n < rows; n++) {
        double sum = 0, size = 1e-30;
        for (int c = 0; c < columns; c++) {
          const double both = x[static_cast<size_t>(r) * columns + c] * p.dense[static_cast<size_t>(n) * columns + c];
          sum += both;
          size += both * both;
        }
        exact = std::max(exact, std::fabs(y[static_cast<size_t>(r) * rows + n] - sum) / (std::sqrt(size) * std::sqrt(columns)));
      }
    }
    Expect(k.name, what + ", exact", exact, 3e-7);
  }
  std::vector<float> row(columns);
  k.read_row(p.matrix, rows - 1, 2, row.data());
  double off = 0;
  for (int c = 0; c < columns; c++)
    off = std::max(off, std::fabs(row[c] - 2 * p.dense[static_cast<size_t>(rows - 1) * columns + c]));
  Expect(k.name, what + ", read_row", off, 1e-4);
}

void CheckRows(const Kernels& k) {
  const int n = 656;
  const std::vector<float> x = Normal(n, 4), w = Normal(n);
  double mean = 0;
  for (float v : x) mean += static_cast<double>(v) * v / n;
  const double inverse = 1 / std::sqrt(mean + 1e-6);
  std::vector<float> a(n), b = w, c(n), d(n), e = x, f(x.begin(), x.begin() + 64);
  k.rms_norm(x.data(), w.data(), a.data(), n, 1e-6f);
  k.add_rms_norm(b.data(), x.data(), w.data(), n, 1e-6f);
  k.gated(x.data(), w.data(), c.data(), n, kGeluTanh);
  k.gated(x.data(), w.data(), d.data(), n, kGelu);
  k.soft_cap(e.data(), n, 2);
  std::vector<float> cosines(32), sines(32);
  for (int i = 0; i < 32; i++) cosines[i] = std::cos(0.3f * i), sines[i] = std::sin(0.3f * i);
  k.rotate(f.data(), cosines.data(), sines.data(), 64, 0.5f);
  double worst[6] = {};
  const auto see = [&](int i, double got, double right) { worst[i] = std::max(worst[i], std::fabs(got - right)); };
  for (int i = 0; i < n; i++) {
    const double v = x[i], g = 0.5 * v * (1 + std::tanh(std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
    see(0, a[i], v * inverse * w[i]);
    see(1, b[i], w[i] + v * inverse * w[i]);
    see(2, c[i], g * w[i]);
    see(3, d[i], 0.5 * v * (1 + std::erf(v / std::sqrt(2))) * w[i]);
    see(4, e[i], 2 * std::tanh(v / 2));
  }
  for (int i = 0; i < 32; i++) {
    see(5, f[i], 0.5 * (static_cast<double>(x[i]) * cosines[i] - static_cast<double>(x[i + 32]) * sines[i]));
    see(5, f[i + 32], 0.5 * (static_cast<double>(x[i + 32]) * cosines[i] + static_cast<double>(x[i]) * sines[i]));
  }
  const float largest = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (int i = 0; i < n; i++) sum += std::exp(static_cast<double>(x[i]) - largest);
  Expect(k.name, "largest", std::fabs(k.largest(x.data(), n) - largest), 0);
  Expect(k.name, "sum of exponentials", std::fabs(k.sum_exp(x.data(), n, largest) / sum - 1), 2e-6);
  const char* names[] = {"rms_norm", "add_rms_norm", "gelu tanh", "gelu", "soft cap", "rotate"};
  for (int i = 0; i < 6; i++) Expect(k.name, names[i], worst[i], 8e-6);
}

void CheckStreams(const Kernels& k) {
  const int n = 80, count = 4, active = 1;
  const std::vector<float> x = Normal(n * count), y = Normal(n), coefs = Normal(count * count);
  std::vector<float> mixed = x, corrected = x, cut = Normal(656, 3);
  k.mix(mixed.data(), n, count, coefs.data(), n);
  k.correct(corrected.data(), n, count, active, y.data(), coefs.data(), n);
  double worst = 0, mean = 0, square = 0;
  for (int i = 0; i < n; i++) {
    for (int j = 0; j < count; j++) {
      double sum = x[j * n + i];
      for (int l = 0; l < count; l++) sum += static_cast<double>(coefs[j * count + l]) * x[l * n + i];
      const double news = static_cast<double>(y[i]) - x[active * n + i];
      worst = std::max({worst, std::fabs(mixed[j * n + i] - sum),
                        std::fabs(corrected[j * n + i] - (x[j * n + i] + coefs[j] * news))});
    }
  }
  Expect(k.name, "streams", worst, 4e-6);
  for (float v : cut) mean += v / 656.0;
  for (float v : cut) square += (v - mean) * (v - mean) / 656.0;
  const std::vector<float> gates = cut;
  k.cut(cut.data(), 656, k.cutoff(cut.data(), 656, 1.5f));
  worst = 0;
  for (int i = 0; i < 656; i++)
    worst = std::max(worst, std::fabs(cut[i] - std::max(0.0, gates[i] - (mean + 1.5 * std::sqrt(square)))));
  Expect(k.name, "cut gates", worst, 4e-6);
}

float Code(float x, float most) {  // to 8 bits, with a scale for the position
  const float scale = most / 127;
  return scale == 0 ? 0 : std::nearbyint(x * (1 / scale)) * scale;
}

std::vector<double> Kept(const std::vector<float>& x, int head_dim, int32_t form) {
  std::vector<double> kept(x.begin(), x.end());
  for (size_t i = 0; i < x.size(); i++) {
    float most = 0;
    for (int d = 0; d < head_dim; d++) most = std::max(most, std::fabs(x[i / head_dim * head_dim + d]));
    if (form != kFloat32) kept[i] = form == kInt8 ? Code(x[i], most) : Cut(x[i]);
  }
  return kept;
}

void CheckAttention(const Kernels& k, int32_t form, int head_dim, float cap) {
  const int length = 300, pages = 3, count = 7;
  const std::vector<float> q = Normal(static_cast<size_t>(count) * head_dim, 0.5f), keys = Normal(length * head_dim),
                           values = Normal(length * head_dim);
  const size_t bytes = PageBytes(form, head_dim), size = static_cast<size_t>(head_dim);
  std::vector<uint8_t> cache(bytes * pages);
  const auto page = [&](int p) { return PageAt(cache.data() + p * bytes, form, head_dim); };
  for (int i = 0; i < length; i++) {
    k.store_key(page(i / kPage), i % kPage, &keys[i * size], head_dim);
    k.store_value(page(i / kPage), i % kPage, &values[i * size], head_dim);
  }
  std::vector<int8_t> codes(q.size() * 2);
  std::vector<float> scales(count);
  std::vector<int32_t> code_sums(static_cast<size_t>(count) * (kSpan / kSums + 1));
  std::vector<Span> rounded;
  for (int i = 0; i < count; i++) {
    rounded.push_back(Span{&q[i * size], &codes[2 * i * size], &scales[i], &code_sums[i * static_cast<size_t>(kSpan / kSums + 1)]});
    k.round(rounded.back(), head_dim);
  }
  const int first[count] = {0, 0, 100, 128, 130, 0, 299}, last[count] = {0, 127, 140, 128, 299, 299, 299};
  std::vector<float> best(count * pages), sums(count * pages), found(count * pages * size);
  for (int p = 0; p < pages; p++) {
    std::vector<Query> queries;
    for (int i = 0; i < count; i++)
      queries.push_back(Query{&q[i * size], &rounded[i], std::max(0, first[i] - p * kPage),
                              std::min(kPage - 1, last[i] - p * kPage), &best[i * pages + p], &sums[i * pages + p],
                              &found[(i * pages + p) * size]});
    k.attend(Attention{page(p), head_dim, cap, queries.data(), count});
  }
  const std::vector<double> kept_keys = Kept(keys, head_dim, form), kept_values = Kept(values, head_dim, form);
  double worst = 0;
  for (int i = 0; i < count; i++) {
    std::vector<float> y(head_dim);
    k.combine(&best[i * pages], &sums[i * pages], &found[i * pages * size], pages, head_dim, y.data());
    std::vector<double> right(head_dim), scores(length, -1e300);
    double top = -1e300, total = 0;
    for (int j = first[i]; j <= last[i]; j++) {
      double s = 0;
      for (int d = 0; d < head_dim; d++) s += static_cast<double>(q[i * size + d]) * kept_keys[j * size + d];
      scores[j] = cap > 0 ? cap * std::tanh(s / cap) : s;
      top = std::max(top, scores[j]);
    }
    for (int j = first[i]; j <= last[i]; j++) {
      const double e = std::exp(scores[j] - top);
      total += e;
      for (int d = 0; d < head_dim; d++) right[d] += e * kept_values[j * size + d];
    }
    for (int d = 0; d < head_dim; d++) worst = std::max(worst, std::fabs(y[d] - right[d] / total));
  }
  // Codes of 15 bits for queries and weights where keys and values are codes: 6e-4 seen.
  Expect(k.name, "attention, form " + std::to_string(form) + ", " + std::to_string(head_dim) + " channels", worst,
         form == kInt8 ? 1e-3 : 1e-5);
}

}  // namespace

#include "check_screen.h"

int main() {
  std::string names = LevelNames();
  for (size_t at = 0; at < names.size();) {
    const size_t end = std::min(names.find(' ', at), names.size());
    const Kernels& k = *Level(names.substr(at, end - at).c_str());
    at = end + 1;
    for (int form : {kFloat32, kBFloat16, kFloat16}) CheckProduct(k, form, 80, 704, 0, false);
    for (bool extreme : {false, true}) {
      CheckProduct(k, kInt8, 80, 4672, 0, extreme);
      CheckProduct(k, kInt8, 48, 640, 64, extreme);
      CheckProduct(k, kInt8, 16, 2048, 2048, extreme);
      CheckProduct(k, kInt4, 80, 4736, 0, extreme);
      CheckProduct(k, kInt4, 48, 640, 32, extreme);
      CheckProduct(k, kInt4, 48, 640, 128, extreme);
      for (int inputs : {32, 128, 2048}) {
        CheckProduct(k, kInt8, 80, 4672, 0, extreme, inputs);
        CheckProduct(k, kInt8, 48, 640, 64, extreme, inputs);
        CheckProduct(k, kInt4, 80, 4736, 0, extreme, inputs);
        CheckProduct(k, kInt4, 48, 640, 32, extreme, inputs);
      }
    }
    for (int group : {0, 32, 64, 128, 2048})
      for (int count : {1, 7}) CheckScreen(k, 48, 4096, group, count);
    CheckRows(k);
    CheckStreams(k);
    for (int form : {kFloat32, kBFloat16, kInt8}) {
      CheckAttention(k, form, 64, 0);
      CheckAttention(k, form, 256, 20);
    }
    std::printf("%s\n", k.name);
  }
  return failures == 0 ? 0 : 1;
}
