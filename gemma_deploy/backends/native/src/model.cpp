#include "model.h"

#include <algorithm>

#include "pass.h"

namespace gemma {
namespace {

constexpr int kMostRows = 256;
constexpr int kRankedRows = 16;  // whose logits are there at once
constexpr int kMostNumbers = 4 << 20;  // of one buffer of a pass

}  // namespace

Model::Model(const std::string& plan, const uint8_t* parameters, uint64_t bytes, const Kernels& level, int threads,
             uint64_t cache_bytes, int32_t cache_form, bool exact)
    : plan_(ReadPlan(plan.data(), plan.size(), parameters, bytes)),
      layout_(plan_.layers, cache_form < 0 ? plan_.cache_form : cache_form),
      pages_(layout_, cache_bytes),
      level_(level),
      pool_(threads),
      buffers_(std::make_unique<Buffers>(plan_, threads)),
      exact_(exact) {
  rows_ = std::clamp(kMostNumbers / buffers_->wide_stride, 16, kMostRows);
}

Model::~Model() = default;

ScreenCounts Model::screened() const { return buffers_->screening.counts(); }

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
  std::vector<Token> last;
  for (int row : wanted) last.push_back(tokens[row]);
  for (const std::vector<Token>& some : {tokens, last})
    if (some.size() == 1) buffers_->GrowPages(plan_, some[0].position / kPage + 1);
  int rank = 0;
  for (const Token& token : tokens)
    if (token.cache->adapter() != nullptr) rank = std::max(rank, token.cache->adapter()->most_rank());
  if (rank > 0) buffers_->GrowLow(static_cast<int>(tokens.size()), rank);
  Pass all(this, buffers_.get(), tokens), rest(this, buffers_.get(), last);
  all.Divide();
  rest.Divide();
  pool_.Run(static_cast<int>(tokens.size()), [&](Worker& worker) {
    all.Begin(worker);
    all.Layers(worker, 0, plan_.first_sharing);
    // Layers from there on leave no keys and values: only what is wanted goes through them.
    if (wanted.empty()) return;
    if (last.size() < tokens.size()) rest.Keep(wanted);
    rest.Layers(worker, plan_.first_sharing, static_cast<int>(plan_.layers.size()));
    rest.Final(worker, normed);
    if (logits != nullptr) rest.Head(worker, normed, static_cast<int>(last.size()), logits, stride());
  });
}

void Model::Head(const float* normed, int rows, float* logits) {
  const std::vector<Token> none;
  buffers_->Grow(plan_, std::min(rows, rows_));
  Pass pass(this, buffers_.get(), none);
  for (int begin = 0; begin < rows; begin += rows_) {
    const int count = std::min(rows_, rows - begin);
    pool_.Run(0, [&](Worker& worker) {
      pass.Head(worker, normed + static_cast<size_t>(begin) * plan_.hidden, count, logits + begin * stride(), stride());
    });
  }
}

void Model::Rank(const float* normed, int rows, const Ranks& ranks) {
  const std::vector<Token> none;
  const int most = std::min(rows_, kRankedRows);
  buffers_->Grow(plan_, std::min(rows, most));
  logits_.Grow(std::min(rows, most) * stride());
  Pass pass(this, buffers_.get(), none);
  for (int begin = 0; begin < rows; begin += most) {
    const int count = std::min(most, rows - begin);
    pool_.Run(0, [&](Worker& worker) {
      pass.Head(worker, normed + static_cast<size_t>(begin) * plan_.hidden, count, logits_.data(), stride());
      ranking_.Rank(worker, level_, logits_.data(), count, stride(), plan_.vocabulary, ranks, begin);
    });
  }
}

void Model::RankLogits(const float* logits, int rows, const Ranks& ranks) {
  pool_.Run(0, [&](Worker& worker) {
    ranking_.Rank(worker, level_, logits, rows, stride(), plan_.vocabulary, ranks, 0);
  });
}

}  // namespace gemma
