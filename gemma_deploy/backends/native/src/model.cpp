#include "model.h"

#include <algorithm>

#include "pass.h"

namespace gemma {
namespace {

constexpr int kMostRows = 256;
constexpr int kMostNumbers = 4 << 20;  // of one buffer of a pass

}  // namespace

Model::Model(const std::string& plan, const uint8_t* parameters, uint64_t bytes, const Kernels& level, int threads,
             uint64_t cache_bytes, int32_t cache_form, bool exact)
    : plan_(ReadPlan(plan.data(), plan.size(), parameters, bytes)),
      layout_(plan_.layers, cache_form),
      pages_(layout_, cache_bytes),
      level_(level),
      pool_(threads),
      buffers_(std::make_unique<Buffers>(plan_, threads)),
      exact_(exact) {
  rows_ = std::clamp(kMostNumbers / buffers_->wide_stride, 16, kMostRows);
}

Model::~Model() = default;

void Model::Step(const std::vector<Piece>& pieces, float* normed, float* logits) {
  std::vector<Token> tokens;
  std::vector<bool> wanted;
  for (const Piece& piece : pieces) {
    for (int i = 0; i < piece.count; i++) {
      tokens.push_back(Token{piece.cache, piece.cache->length() + i, piece.tokens[i]});
      wanted.push_back(i >= piece.count - piece.wanted);
    }
  }
  for (size_t begin = 0; begin < tokens.size(); begin += rows_) {
    const size_t end = std::min(tokens.size(), begin + rows_);
    const std::vector<Token> some(tokens.begin() + begin, tokens.begin() + end);
    std::vector<int> rows;
    for (size_t i = begin; i < end; i++)
      if (wanted[i]) rows.push_back(static_cast<int>(i - begin));
    normed_.Grow(rows.size() * plan_.hidden);
    One(some, rows, normed != nullptr ? normed : normed_.data(), logits);
    if (normed != nullptr) normed += rows.size() * plan_.hidden;
    if (logits != nullptr) logits += rows.size() * stride();
  }
  for (const Piece& piece : pieces) piece.cache->Advance(piece.count);
}

void Model::One(const std::vector<Token>& tokens, const std::vector<int>& wanted, float* normed, float* logits) {
  buffers_->Grow(plan_, static_cast<int>(tokens.size()));
  if (tokens.size() == 1) buffers_->GrowPages(plan_, tokens[0].position / kPage + 1);
  Pass pass(this, buffers_.get(), tokens);
  pass.Divide();
  pool_.Run([&](Worker& worker) {
    pass.Layers(worker);
    if (wanted.empty()) return;
    pass.Final(worker, wanted, normed);
    if (logits != nullptr) pass.Head(worker, normed, static_cast<int>(wanted.size()), logits, stride());
  });
}

void Model::Head(const float* normed, int rows, float* logits) {
  const std::vector<Token> none;
  buffers_->Grow(plan_, std::min(rows, rows_));
  Pass pass(this, buffers_.get(), none);
  for (int begin = 0; begin < rows; begin += rows_) {
    const int count = std::min(rows_, rows - begin);
    pool_.Run([&](Worker& worker) {
      pass.Head(worker, normed + static_cast<size_t>(begin) * plan_.hidden, count, logits + begin * stride(), stride());
    });
  }
}

}  // namespace gemma
