#include "cache.h"

#include <cstdlib>
#include <cstring>

namespace gemma {
namespace {

constexpr size_t kLine = 64;

int PagesOf(int length) { return (length + kPage - 1) / kPage; }

}  // namespace

CacheLayout::CacheLayout(const std::vector<LayerPlan>& plan, int32_t form) : form(form) {
  for (size_t i = 0; i < plan.size(); i++) {
    const LayerPlan& layer = plan[i];
    if (layer.source != static_cast<int>(i)) {
      layers.push_back(layers[layer.source]);
      continue;
    }
    size_t kind = 0;
    while (kind < kinds.size() && kinds[kind].window != layer.window) kind++;
    if (kind == kinds.size()) kinds.push_back(CacheKind{layer.window, 0});
    layers.push_back(CachePlace{static_cast<int>(kind), kinds[kind].bytes, layer.head_dim});
    kinds[kind].bytes += layer.kv_heads * PageBytes(form, layer.head_dim);
  }
}

PagePool::~PagePool() {
  for (const auto& block : all_) std::free(block->data);
}

PagePool::Block* PagePool::Take(int kind) {
  if (!free_[kind].empty()) {
    Block* block = free_[kind].back();
    free_[kind].pop_back();
    block->users = 1;
    used_ += kinds_[kind].bytes;
    return block;
  }
  const size_t bytes = kinds_[kind].bytes;
  // Pages of another kind that nobody uses make room.
  for (size_t other = 0; other < free_.size() && reserved_ + bytes > limit_; other++) {
    while (!free_[other].empty() && reserved_ + bytes > limit_) {
      Block* block = free_[other].back();
      std::free(block->data);
      block->data = nullptr;
      free_[other].pop_back();
      empty_.push_back(block);
      reserved_ -= kinds_[other].bytes;
    }
  }
  if (reserved_ + bytes > limit_) return nullptr;
  uint8_t* data = static_cast<uint8_t*>(std::aligned_alloc(kLine, bytes));  // bytes are a multiple of 64
  if (data == nullptr) return nullptr;
  std::memset(data, 0, bytes);
  if (empty_.empty()) {
    all_.push_back(std::make_unique<Block>());
    empty_.push_back(all_.back().get());
  }
  Block* block = empty_.back();
  empty_.pop_back();
  *block = Block{data, kind, 1};
  reserved_ += bytes;
  used_ += bytes;
  return block;
}

void PagePool::Release(Block* block) {
  if (--block->users > 0) return;
  used_ -= kinds_[block->kind].bytes;
  free_[block->kind].push_back(block);
}

Sequence::Sequence(const CacheLayout& layout, PagePool* pool)
    : layout_(&layout), pool_(pool), pages_(layout.kinds.size()) {}

Sequence::~Sequence() {
  for (size_t kind = 0; kind < pages_.size(); kind++)
    for (size_t i = 0; i < pages_[kind].size(); i++) Drop(static_cast<int>(kind), i);
}

void Sequence::Drop(int kind, size_t index) {
  if (pages_[kind][index] != nullptr) pool_->Release(pages_[kind][index]);
  pages_[kind][index] = nullptr;
}

bool Sequence::Reserve(int count) {
  const size_t kinds = pages_.size(), before = static_cast<size_t>(PagesOf(length_)),
               after = static_cast<size_t>(PagesOf(length_ + count));
  std::vector<PagePool::Block*> copies(kinds, nullptr);
  bool room = true;
  for (size_t kind = 0; kind < kinds && room; kind++) {
    if (length_ % kPage != 0 && pages_[kind][before - 1]->users > 1) {  // the page that is written next is shared
      copies[kind] = pool_->Take(static_cast<int>(kind));
      room = copies[kind] != nullptr;
    }
    while (room && pages_[kind].size() < after) {
      PagePool::Block* block = pool_->Take(static_cast<int>(kind));
      room = block != nullptr;
      if (room) pages_[kind].push_back(block);
    }
  }
  for (size_t kind = 0; kind < kinds; kind++) {
    if (!room) {
      if (copies[kind] != nullptr) pool_->Release(copies[kind]);
      for (size_t i = before; i < pages_[kind].size(); i++) Drop(static_cast<int>(kind), i);
      pages_[kind].resize(before < pages_[kind].size() ? before : pages_[kind].size());
    } else if (copies[kind] != nullptr) {
      PagePool::Block*& last = pages_[kind][before - 1];
      std::memcpy(copies[kind]->data, last->data, layout_->kinds[kind].bytes);
      pool_->Release(last);
      last = copies[kind];
    }
  }
  return room;
}

void Sequence::Advance(int count) {
  Cache::Advance(count);
  for (size_t kind = 0; kind < pages_.size(); kind++) {
    // One page more than the next query sees is kept, so that drafts can be taken back.
    const int keep = FirstSeen(layout_->kinds[kind].window, length_ - kPage) / kPage;
    for (int i = keep - 1; i >= 0 && pages_[kind][i] != nullptr; i--) Drop(static_cast<int>(kind), i);
  }
}

bool Sequence::Rewind(int length) {
  if (length < 0 || length > length_) return false;
  for (size_t kind = 0; kind < pages_.size(); kind++)
    for (int i = FirstSeen(layout_->kinds[kind].window, length) / kPage; i < PagesOf(length); i++)
      if (pages_[kind][i] == nullptr) return false;
  const size_t pages = static_cast<size_t>(PagesOf(length));
  for (size_t kind = 0; kind < pages_.size(); kind++) {
    for (size_t i = pages; i < pages_[kind].size(); i++) Drop(static_cast<int>(kind), i);
    pages_[kind].resize(pages);
  }
  length_ = length;
  return true;
}

std::unique_ptr<Sequence> Sequence::Fork() const {
  auto copy = std::make_unique<Sequence>(*layout_, pool_);
  copy->length_ = length_;
  copy->adapter_ = adapter_;
  copy->pages_ = pages_;
  for (const auto& kind : pages_)
    for (PagePool::Block* block : kind)
      if (block != nullptr) block->users++;
  return copy;
}

}  // namespace gemma
