// What a level has: one function for each kind of work, on plain data. A level is a set of CPU features.
//
// What a function gives for one row does not depend on the rows beside it, on the panels that it is asked for together,
// or on the thread that runs it: sums are taken in an order that follows from the sizes alone.
#pragma once

#include "layout.h"

namespace gemma {

// y[r][16 * panel + i] = row r times output feature i of the panel, for rows 0..count and panels begin..end.
//
// Inputs are taken a span at a time, from first to last of all that the matrix has. Where a product is done in several
// calls, spans in their order, y holds what the spans before have given.
struct Product {
  const Matrix* matrix;
  const Span* rows;  // [count][row_spans], of each row the spans first..last
  int row_spans;
  int count;
  float* y;
  size_t stride;  // of y, in floats
  int begin, end;  // panels; y begins at panel 0
  int first, last;  // spans
  bool exact;      // of codes: float32 products of what they stand for and of rows that are not rounded
  bool added = false;  // of floats: to what y holds
};

// A row of activations as a screened head (screening.h) takes it. Groups are those of the matrix's scales, or one for all.
struct Screened {
  const Span* spans;         // of the row
  const int16_t* codes;      // [columns]: the same codes in their order
  const int8_t *high, *low;  // [columns]: the same in two bytes, 128 * high + low, low from -64 to 63
  // [groups]: a half of a code is 0 to 15. What its mean gives, half the variance of what all together give (both where
  // scales are 1), and the most by which they give another sum than their mean.
  const float *middle, *spread, *most;
};

// Of a half variance, that logits are lowered by: larger ones say nothing of a logit, and would cost it digits.
constexpr float kMostSpread = 16;

// y[r][16 * panel + i] = row r times output feature i of planes, from their high halves: as if low ones were their mean,
// less half the variance of that. A ceiling is what a product of whole codes does not exceed.
struct Screen {
  const Matrix* matrix;
  const Screened* rows;
  int count;
  float *y, *ceilings;
  size_t stride;   // of both, in floats
  int begin, end;  // panels
};

// One query of one head: attends to positions first..last of a page, and says what it found there.
struct Query {
  const float* q;  // [D], scaled
  const Span* rounded;  // the same, for pages of int8
  int first, last;  // within the page; first > last: it sees none
  float* best;      // the largest score, -infinity where it sees none
  float* sum;       // of exp(score - best)
  float* values;    // [D]: sum of exp(score - best) * value
};

struct Attention {
  Page page;
  int head_dim;  // a multiple of 32
  float cap;     // of the scores, 0 for none
  const Query* queries;
  int count;
};

enum Activation : int32_t { kGeluTanh = 0, kGelu = 1 };

constexpr int kMostStreams = 8;

struct Kernels {
  const char* name;

  // Rounds at most kSpan inputs, a multiple of kSums, to codes of 15 bits. Zeros have the scale 0.
  void (*round)(const Span& span, int inputs);
  // The same to 8 bits, with a scale for each `group` of inputs, a power of two from kSums to kSpan.
  void (*round8)(const Span& span, int inputs, int group);

  // Of rows that are rounded as the matrix wants them (RoundingOf).
  void (*product)(const Product& work);

  // Panels begin..end of planes, their high halves alone.
  void (*screen)(const Screen& work);
  // Makes of what `screen` gave for `count` output features of a row, y[outputs[i]], products of whole codes.
  void (*refine)(const Matrix& matrix, const Screened& row, const int32_t* outputs, int count, float* y);

  // One row of a matrix [N, K] as floats, times `factor`.
  void (*read_row)(const Matrix& matrix, int row, float factor, float* y);

  // y = x * rsqrt(mean(x^2) + eps) * weight over n channels; no weight: 1. x and y may be the same.
  void (*rms_norm)(const float* x, const float* weight, float* y, int n, float eps);

  // x += rms_norm(y): one pass behind a branch with a norm at its end.
  void (*add_rms_norm)(float* x, const float* y, const float* weight, int n, float eps);

  // y = activation(gate) * up over n channels.
  void (*gated)(const float* gate, const float* up, float* y, int n, int32_t activation);

  // Turns the pairs (i, i + n / 2) of a head by angles given as cosines and sines [n / 2], times `factor`.
  void (*rotate)(float* x, const float* cosines, const float* sines, int n, float factor);

  // Writes the key or value [D] of one position into a page.
  void (*store_key)(const Page& page, int position, const float* x, int head_dim);
  void (*store_value)(const Page& page, int position, const float* x, int head_dim);

  void (*attend)(const Attention& work);

  // Adds up what `count` pages gave for one query, in their order: y = sum(values) / sum(sums), weighed by their best.
  void (*combine)(const float* best, const float* sums, const float* values, int count, int head_dim, float* y);

  // y = cap * tanh(x / cap) over n numbers.
  void (*soft_cap)(float* x, int n, float cap);

  // Streams x_j of n channels, `stride` apart, not more than kMostStreams: x_j += sum over i of coefs[j][i] * x_i.
  void (*mix)(float* x, size_t stride, int count, const float* coefs, int n);

  // x_j += coefs[j] * (y - x_active), of those that there were before.
  void (*correct)(float* x, size_t stride, int count, int active, const float* y, const float* coefs, int n);

  // The mean of n numbers and `quantile` times their deviation from it.
  float (*cutoff)(const float* x, int n, float quantile);

  // x = max(x - cutoff, 0).
  void (*cut)(float* x, int n, float cutoff);

  // The largest of n numbers, a multiple of 16; -infinity of none.
  float (*largest)(const float* x, int n);
  // The sum of exp(x - best) over n numbers, none larger than `best`; no finite number where one of them is none.
  float (*sum_exp)(const float* x, int n, float best);
};

// Each is null where the compiler or the architecture has no such level.
extern const Kernels* const kPlain;
extern const Kernels* const kAvx2;
extern const Kernels* const kAvxVnni;
extern const Kernels* const kAvx512Vnni;
extern const Kernels* const kAmx;
extern const Kernels* const kNeonDot;

}  // namespace gemma
