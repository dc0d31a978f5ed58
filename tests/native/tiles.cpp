// Products with tiles (generic_tiles.h), where tiles are plain C++: no emulator here has AMX. With vectors of AVX-512 where
// they are compiled for, else in plain C++.
//
// Rows must have the bits that vectors give to each alone, and be as near to sums in double precision.
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "generic_rows.h"
#include "generic_tiles.h"
#include "generic_tiles8.h"
#if defined(__AVX512VNNI__)
#include "vector_amx.h"
#endif
#include "vector_plain.h"

using namespace gemma;

namespace {

struct PlainPlanes : Plain {
  struct X {
    int8_t high[4], low[4];
  };
  struct Acc {
    I high, low;
  };
  static size_t At(int k) { return static_cast<size_t>(k / 64) * 128 + k % 64; }
  static void StoreCodes(int8_t* codes, int k, F x) {
    for (int i = 0; i < 16; i++) {
      const int q = static_cast<int>(x.v[i]), low = ((q % 128) + 128) % 128;
      codes[At(k + i)] = static_cast<int8_t>((q - low) / 128);
      codes[At(k + i) + 64] = static_cast<int8_t>(low);
    }
  }
  static X Codes(const int8_t* codes, int k) {
    X x;
    for (int i = 0; i < 4; i++) x.high[i] = codes[At(k + i)], x.low[i] = codes[At(k + i) + 64];
    return x;
  }
  static Acc Begin() { return Acc{}; }
  static void Dot(Acc& acc, const B& w, const X& x) {
    for (int i = 0; i < 64; i++) acc.high.v[i / 4] += w.v[i] * x.high[i % 4], acc.low.v[i / 4] += w.v[i] * x.low[i % 4];
  }
  static I Total(const Acc& acc) { return Join(acc.high.v, acc.low.v); }
  static I Join(const int32_t* high, const int32_t* low) {
    I total;
    for (int i = 0; i < 16; i++) total.v[i] = high[i] * 128 + low[i];
    return total;
  }
};

// Of activations of 8 bits: one plane.
struct PlainBytes : Plain {
  using X = std::array<int8_t, 4>;
  static void StoreCodes(int8_t* codes, int k, F x) {
    for (int i = 0; i < 16; i++) codes[k + i] = static_cast<int8_t>(x.v[i]);
  }
  static X Codes(const int8_t* codes, int k) { return X{codes[k], codes[k + 1], codes[k + 2], codes[k + 3]}; }
  static Acc Begin(int32_t from) { return Acc{SetInt(from)}; }
  static void Dot(Acc& acc, const B& w, const X& x) {
    for (int i = 0; i < 64; i++) acc.sum.v[i / 4] += w.v[i] * x[i % 4];
  }
  static I LoadInt(const int32_t* p) {
    I x;
    std::memcpy(x.v, p, sizeof x.v);
    return x;
  }
};

#if defined(__AVX512VNNI__)
using Vectors = Amx512;
using Bytes = Avx512Eight;
#else
using Vectors = PlainPlanes;
using Bytes = PlainBytes;
#endif

// What the instructions do, by Intel's manual; and whether they were allowed to.
int multiplied = 0;
bool configured = false;
uint8_t tiles[8][16][64];

struct PlainTiles {
  static void Allowed() {
    if (!configured) std::abort();
  }
  static void Begin() {
    configured = true;
    std::memset(tiles, 0x5a, sizeof tiles);
  }
  static void End() { configured = false; }
  template <int Tile>
  static void Zero() {
    Allowed();
    std::memset(tiles[Tile], 0, sizeof tiles[Tile]);
  }
  template <int Tile>
  static void Load(const void* from, size_t stride) {
    Allowed();
    for (size_t r = 0; r < 16; r++) std::memcpy(tiles[Tile][r], static_cast<const char*>(from) + r * stride, 64);
  }
  template <int Tile>
  static void Store(void* to, size_t stride) {
    Allowed();
    for (size_t r = 0; r < 16; r++) std::memcpy(static_cast<char*>(to) + r * stride, tiles[Tile][r], 64);
  }
  template <int Sum, int A, int B>
  static void Multiply() {
    Allowed();
    multiplied++;
    for (int m = 0; m < 16; m++) {
      for (int n = 0; n < 16; n++) {
        int32_t sum;
        std::memcpy(&sum, &tiles[Sum][m][4 * n], 4);
        for (int k = 0; k < 16; k++)
          for (int j = 0; j < 4; j++) sum += static_cast<int8_t>(tiles[A][m][4 * k + j]) * tiles[B][k][4 * n + j];
        std::memcpy(&tiles[Sum][m][4 * n], &sum, 4);
      }
    }
  }
};

std::mt19937 draw(11);

void Fail(const char* what, int32_t form, int group, int rows, double value) {
  std::printf("%s: form %d, group %d, %d rows: %g\n", what, form, group, rows, value);
  std::exit(1);
}

// `scattered`: rows do not lie at equal distances, as those of experts; `inputs`: of a group of activations of 8 bits.
void Check(int32_t form, int panels, int columns, int group, int rows, bool extreme, bool scattered, int inputs = 0) {
  const int outputs = panels * kLanes, groups = group == 0 ? 1 : columns / group, spans = Spans(columns);
  std::vector<uint8_t> bytes(panels * PanelBytes(form, columns));
  for (uint8_t& b : bytes) b = extreme ? 0 : static_cast<uint8_t>(draw());
  std::vector<float> scales(static_cast<size_t>(outputs) * groups), x(static_cast<size_t>(rows) * columns);
  for (float& s : scales) s = 0.5f + static_cast<float>(draw() % 1000) / 1000;
  for (float& v : x) v = extreme ? -3.0f : static_cast<float>(draw() % 20001) / 1000 - 10;
  if (!extreme) std::fill_n(x.begin(), columns, 0.0f);
  const Matrix m{bytes.data(), reinterpret_cast<const uint8_t*>(scales.data()), form, kFloat32, outputs, columns, group, inputs};
  const size_t room = static_cast<size_t>(columns) * 2 + (scattered ? 64 : 0);
  std::vector<int8_t> codes(room * rows * 2);
  std::vector<float> row_scales(static_cast<size_t>(rows) * spans * (kSpan / kSums));
  std::vector<int32_t> sums(static_cast<size_t>(rows) * spans * (kSpan / kSums + 1));
  std::vector<Span> all;
  for (int i = 0; i < rows * spans; i++) {
    const size_t row = i / spans, begin = static_cast<size_t>(i % spans) * kSpan;
    const size_t place = scattered ? row * row % (2 * rows) : row;  // 0, 1, 4, 9 ...: some rows share a place with another
    all.push_back(Span{&x[row * columns + begin], &codes[place * room + 2 * begin], &row_scales[i * (kSpan / kSums)], &sums[i * static_cast<size_t>(kSpan / kSums + 1)]});
  }
  std::vector<float> one(static_cast<size_t>(rows) * outputs, NAN), many = one;
  const auto product = [&](int first, int count, float* y) {
    return Product{&m, &all[static_cast<size_t>(first) * spans], spans, count, y, static_cast<size_t>(outputs), 0, panels, 0, spans, false};
  };
  const auto round = [&](int row) {
    for (int s = 0; s < spans; s++) {
      const Span& span = all[static_cast<size_t>(row) * spans + s];
      const int wanted = columns - s * kSpan < kSpan ? columns - s * kSpan : kSpan;
      inputs == 0 ? Rows<Vectors>::Round(span, wanted) : Products8<Bytes>::Round(span, wanted, inputs);
    }
  };
  for (int r = 0; r < rows; r++) round(r);
  for (int r = 0; r < rows; r++) {
    const Product alone = product(r, 1, &one[static_cast<size_t>(r) * outputs]);
    inputs == 0 ? Products<Vectors>::Run(alone) : Products8<Bytes>::Run(alone);
  }
  multiplied = 0;
  const Product together = product(0, rows, many.data());
  inputs == 0 ? TileProducts<Vectors, PlainTiles>::Run(together) : TileProducts8<Bytes, PlainTiles>::Run(together);
  const int least = inputs == 0 && form == kInt4 ? 128 : 64;
  const bool wanted = rows >= 4 && (group == 0 || group >= least) && (inputs == 0 || inputs >= 64);
  if ((multiplied > 0) != wanted || configured) Fail("tiles are used where they should not be, or not where they should", form, group, rows, multiplied);
  if (std::memcmp(one.data(), many.data(), one.size() * 4) != 0) Fail("other bits than alone", form, group, rows, 0);
  if (scattered) return;
  for (int r = 0; r < rows; r++) {
    double most = 1e-30, worst = 0;
    for (int n = 0; n < outputs; n++) {
      double right = 0;
      for (int k = 0; k < columns; k++) {
        const uint8_t* panel = &bytes[n / kLanes * PanelBytes(form, columns)];
        const int lane = n % kLanes;
        const uint8_t byte = form == kInt8 ? panel[k / 4 * 64 + lane * 4 + k % 4]
                                           : panel[k / 128 * 1024 + k % 64 / 4 * 64 + lane * 4 + k % 4];
        const int code = form == kInt8 ? byte - 128 : (k % 128 < 64 ? byte & 15 : byte >> 4) - 8;
        const float scale = row_scales[(static_cast<size_t>(r) * spans + k / kSpan) * (kSpan / kSums) + (inputs == 0 ? 0 : k % kSpan / inputs)];
        const double rounded = scale == 0 ? 0 : std::nearbyint(x[static_cast<size_t>(r) * columns + k] * (1 / scale)) * static_cast<double>(scale);
        right += rounded * code * scales[(static_cast<size_t>(n / kLanes) * groups + (group == 0 ? 0 : k / group)) * kLanes + lane];
      }
      most = std::fmax(most, std::fabs(right));
      worst = std::fmax(worst, std::fabs(many[static_cast<size_t>(r) * outputs + n] - right));
    }
    if (!(worst / most < 2e-6)) Fail("far from double precision", form, group, rows, worst / most);  // 5e-7 seen
  }
}

}  // namespace

int main() {
  for (int rows : {1, 3, 4, 15, 16, 17, 40})
    for (bool scattered : {false, true}) {
      Check(kInt8, 3, 640, 0, rows, false, scattered);
      Check(kInt8, 2, 2112, 0, rows, false, scattered);
      Check(kInt8, 1, 640, 128, rows, false, scattered);
      Check(kInt8, 2, 256, 64, rows, false, scattered);
      Check(kInt8, 2, 256, 32, rows, false, scattered);
      Check(kInt4, 3, 640, 0, rows, false, scattered);
      Check(kInt4, 2, 2176, 128, rows, false, scattered);
      Check(kInt4, 2, 256, 64, rows, false, scattered);
      for (int inputs : {32, 64, 128, 2048}) {
        Check(kInt8, 3, 704, 0, rows, false, scattered, inputs);
        Check(kInt8, 2, 2176, 128, rows, false, scattered, inputs);
        Check(kInt4, 3, 640, 64, rows, false, scattered, inputs);
      }
    }
  for (int32_t form : {kInt8, kInt4})
    for (int inputs : {0, 128, 2048}) Check(form, 2, 4224, 0, 17, true, false, inputs);  // sums at their bound
  std::printf("%s\n", sizeof(Vectors::X) > 8 ? "AVX-512" : "plain");
  return 0;
}
