#include "adapter.h"

#include <cstring>
#include <string>

#include "plan_line.h"

namespace gemma {
namespace {

constexpr long kMostRank = 4096;
constexpr uint64_t kMostBytes = uint64_t{1} << 34;
constexpr const char* kNames[] = {"q", "k", "v", "o", "gate", "up", "down"};

constexpr int Up(int n, int of) { return (n + of - 1) / of * of; }

struct Size {
  int inputs, outputs;  // 0: the layer has no such matrix of its own
};

Size SizeOf(const Plan& plan, int layer, int linear) {
  const LayerPlan& l = plan.layers[layer];
  const bool own = l.source == layer;
  const int q = l.heads * l.head_dim, kv = l.kv_heads * l.head_dim;
  switch (linear) {
    case kQ:
      return Size{plan.hidden, q};
    case kK:
      return Size{plan.hidden, own ? kv : 0};
    case kV:
      return Size{plan.hidden, own && l.has_v ? kv : 0};
    case kO:
      return Size{q, plan.hidden};
    case kDown:
      return Size{l.width, plan.hidden};
    default:
      return Size{plan.hidden, l.width};
  }
}

Matrix Take(Line& line, const std::string& key, Matrix m, const uint8_t* data, uint64_t bytes) {
  const uint64_t size = m.rows / kLanes * PanelBytes(m.form, m.columns);
  const uint64_t at = static_cast<uint64_t>(line.Whole(key, 0, static_cast<long>(kMostBytes)));
  if (at % 64 != 0) line.Fail("'" + key + "' is no multiple of 64");
  if (at > bytes || size > bytes - at)
    line.Fail("'" + key + "': bytes " + std::to_string(at) + " to " + std::to_string(at + size) + " of " +
              std::to_string(bytes));
  m.panels = data + at;
  return m;
}

}  // namespace

Adapter::Adapter(const char* text, size_t size, const uint8_t* data, uint64_t bytes, const Plan& plan)
    : all_(plan.layers.size() * kLinears, LowRank{0, Matrix{}, Matrix{}}) {
  if (bytes > kMostBytes) throw Error("adapter: more than " + std::to_string(kMostBytes) + " bytes");
  data_.Grow(bytes);
  if (bytes > 0) std::memcpy(data_.data(), data, bytes);
  const std::string all(text, size);
  int number = 0;
  for (size_t at = 0; at < all.size();) {
    size_t end = all.find('\n', at);
    if (end == std::string::npos) end = all.size();
    Line line("adapter", all.substr(at, end - at), ++number);
    at = end + 1;
    if (line.word() != "adapts") line.Fail("'" + line.word() + "' is not known");
    const int layer = static_cast<int>(line.Whole("layer", 0, static_cast<long>(plan.layers.size()) - 1));
    const std::string name = line.Text("linear"), form = line.Text("form");
    int linear = 0;
    while (linear < kLinears && name != kNames[linear]) linear++;
    if (linear == kLinears) line.Fail("'linear' is " + name);
    if (form != "float32" && form != "bfloat16") line.Fail("'form' is " + form);
    const Size sizes = SizeOf(plan, layer, linear);
    if (sizes.outputs == 0) line.Fail("layer " + std::to_string(layer) + " has no matrix of its own for " + name);
    LowRank& found = all_[static_cast<size_t>(layer) * kLinears + linear];
    if (found.rank != 0) line.Fail(name + " of layer " + std::to_string(layer) + " is there twice");
    const int rank = static_cast<int>(line.Whole("rank", kLanes, kMostRank));
    if (rank % kLanes) line.Fail("'rank' is " + std::to_string(rank) + ", no multiple of 16");
    const int32_t kind = form == "float32" ? kFloat32 : kBFloat16;
    found.rank = rank;
    found.down = Take(line, "down", Matrix{nullptr, nullptr, kind, kFloat32, rank, Up(sizes.inputs, kBlock), 0},
                      data_.data(), bytes);
    found.up = Take(line, "up", Matrix{nullptr, nullptr, kind, kFloat32, Up(sizes.outputs, kLanes), rank, 0},
                    data_.data(), bytes);
    line.Done();
    if (rank > most_rank_) most_rank_ = rank;
  }
}

}  // namespace gemma
