// A part of check.cpp, with whose random numbers and Expect it works.
#pragma once

namespace {

// Both passes of a screened head: what high halves give, and products of whole codes.
void CheckScreen(const Kernels& k, int rows, int columns, int group, int count) {
  const int groups = group == 0 ? 1 : columns / group, size = columns / groups, spans = Spans(columns);
  const size_t half = static_cast<size_t>(columns) / 2;
  std::vector<uint8_t> bytes(2 * rows * half);
  std::vector<int> codes(static_cast<size_t>(rows) * columns);
  std::vector<float> scales(static_cast<size_t>(rows) * groups), x = Normal(static_cast<size_t>(count) * columns);
  for (float& s : scales) s = static_cast<float>(1 + random_numbers() % 1000) * 4e-6f;
  for (int n = 0; n < rows; n++) {
    for (int c = 0; c < columns; c++) {
      const int code = static_cast<int>(random_numbers() % 256);
      codes[static_cast<size_t>(n) * columns + c] = code;
      uint8_t& high = bytes[n / 16 * 16 * half + c / 128 * 1024 + c % 64 / 4 * 64 + n % 16 * 4 + c % 4];
      uint8_t& low = bytes[(rows + n) * half + c / 64 * 32 + c % 32];
      high = static_cast<uint8_t>(high | (code >> 4) << (c % 128 < 64 ? 0 : 4));
      low = static_cast<uint8_t>(low | (code & 15) << (c % 64 < 32 ? 0 : 4));
    }
  }
  std::vector<int8_t> ordered(x.size() * 2), parts(x.size() * 2);
  std::vector<int16_t> whole(x.size());
  std::vector<float> steps(count * spans), sums(static_cast<size_t>(count) * groups * 3);
  std::vector<int32_t> running(static_cast<size_t>(count) * spans * (kSpan / kSums + 1));
  std::vector<Span> all(count * spans);
  std::vector<Screened> screened;
  for (int r = 0; r < count; r++) {
    for (int s = 0; s < spans; s++) {
      const size_t at = static_cast<size_t>(r) * columns + s * kSpan, i = static_cast<size_t>(r) * spans + s;
      all[i] = Span{&x[at], &ordered[2 * at], &steps[i], &running[i * (kSpan / kSums + 1)]};
      k.round(all[i], std::min(kSpan, columns - s * kSpan));
    }
    float* own = &sums[static_cast<size_t>(r) * groups * 3];
    int8_t *high = &parts[2 * static_cast<size_t>(r) * columns], *low = high + columns;
    for (int c = 0; c < columns; c++) {
      const float step = steps[r * spans + c / kSpan];
      const size_t at = static_cast<size_t>(r) * columns + c;
      const int code = static_cast<int>(std::nearbyint(x[at] * (1 / step)));
      whole[at] = static_cast<int16_t>(code);
      high[c] = static_cast<int8_t>((code + 64) >> 7);
      low[c] = static_cast<int8_t>(code - 128 * high[c]);
      own[c / size] += 7.5f * code * step;
      own[groups + c / size] += 255.0f / 24 * code * step * code * step;
      own[2 * groups + c / size] += 7.5f * std::fabs(code * step);
    }
    screened.push_back(Screened{&all[r * spans], &whole[static_cast<size_t>(r) * columns], high, low, own, own + groups, own + 2 * groups});
  }
  const Matrix m{bytes.data(), reinterpret_cast<const uint8_t*>(scales.data()), kPlanes, kFloat32, rows, columns, group, 0};
  std::vector<float> y(static_cast<size_t>(count) * rows), ceilings(y.size());
  k.screen(Screen{&m, screened.data(), count, y.data(), ceilings.data(), static_cast<size_t>(rows), 0, rows / kLanes});
  std::vector<int32_t> list(rows);
  for (int n = 0; n < rows; n++) list[n] = n;
  double rough = 0, fine = 0, over = 0;
  for (int r = 0; r < count; r++) {
    std::vector<float> refined(&y[static_cast<size_t>(r) * rows], &y[static_cast<size_t>(r) * rows] + rows);
    k.refine(m, screened[r], list.data(), rows, refined.data());
    for (int n = 0; n < rows; n++) {
      double high = 0, right = 0, spread = 0;
      for (int c = 0; c < columns; c++) {
        const int code = codes[static_cast<size_t>(n) * columns + c];
        const double v = static_cast<double>(whole[static_cast<size_t>(r) * columns + c]) * steps[r * spans + c / kSpan];
        const double w = v * scales[static_cast<size_t>(n) * groups + c / size];
        high += w * (code / 16 * 16 + 7.5 - 128);
        right += w * (code - 128);
        spread += w * w * 255 / 24;
      }
      rough = std::max(rough, std::fabs(y[static_cast<size_t>(r) * rows + n] - (high - std::min<double>(spread, kMostSpread))));
      fine = std::max(fine, std::fabs(refined[n] - right));
      over = std::max(over, right - ceilings[static_cast<size_t>(r) * rows + n]);
    }
  }
  const std::string what = "screen, " + std::to_string(columns) + " columns, group " + std::to_string(group);
  Expect(k.name, what, rough, 1e-4);
  Expect(k.name, what + ", whole rows", fine, 1e-4);
  Expect(k.name, what + ", ceilings", over, 1e-4);
}

}  // namespace
