#include "model.h"

#include <algorithm>

#include "pass.h"

namespace gemma {
namespace {

constexpr int kMostRows = 256;
constexpr int kMostNumbers = 4 << 20;  // of one buffer of a pass

}  // namespace

Model::Model(const std::string& plan, const std::string& parameters, const Kernels& level, int threads,
             uint64_t cache_bytes, int32_t cache_form)
    : file_(parameters),
      plan_(ReadPlan(plan.data(), plan.size(), file_.data(), file_.size())),
      layout_(plan_.layers, cache_form),
      pages_(layout_, cache_bytes),
      level_(level),
      pool_(threads),
      buffers_(std::make_unique<Buffers>(plan_, threads)) {
  rows_ = std::clamp(kMostNumbers / buffers_->wide_stride, 16, kMostRows);
}

Model::~Model() = default;

void Model::Step(const std::vector<Piece>& pieces, float* logits) {
  std::vector<Token> tokens;
  std::vector<bool> wanted;
  for (const Piece& piece : pieces) {
    for (int i = 0; i < piece.count; i++) {
      tokens.push_back(Token{piece.sequence, piece.sequence->length() + i, piece.tokens[i]});
      wanted.push_back(i >= piece.count - piece.wanted);
    }
  }
  for (size_t begin = 0; begin < tokens.size(); begin += rows_) {
    const size_t end = std::min(tokens.size(), begin + rows_);
    const std::vector<Token> some(tokens.begin() + begin, tokens.begin() + end);
    std::vector<int> rows;
    for (size_t i = begin; i < end; i++)
      if (wanted[i]) rows.push_back(static_cast<int>(i - begin));
    One(some, rows, logits);
    logits += rows.size() * stride();
  }
  for (const Piece& piece : pieces) piece.sequence->Advance(piece.count);
}

void Model::One(const std::vector<Token>& tokens, const std::vector<int>& wanted, float* logits) {
  buffers_->Grow(plan_, static_cast<int>(tokens.size()));
  if (tokens.size() == 1) buffers_->GrowPages(plan_, tokens[0].position / kPage + 1);
  Pass pass(this, buffers_.get(), tokens);
  pass.Divide();
  pool_.Run([&](Worker& worker) {
    pass.Layers(worker);
    pass.Logits(worker, wanted, logits, stride());
  });
}

}  // namespace gemma
