#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <map>
#include <string>

#include "kernels.h"
#include "plan_line.h"
#include "plan_tensors.h"

namespace gemma {
namespace {

class Reader : private Tensors {
 public:
  Reader(const uint8_t* data, uint64_t bytes) : Tensors(data, bytes) {}

  void Take(Line& line) {
    const std::string& word = line.word();
    if (!begun_ && word != "model") line.Fail("a plan begins with 'model'");
    using Taking = void (Reader::*)(Line&);
    static const std::map<std::string, Taking> kWords = {
        {"model", &Reader::TakeModel},     {"matrix", &Reader::TakeMatrix}, {"table", &Reader::TakeTable},
        {"vector", &Reader::TakeVector},   {"layer", &Reader::TakeLayer},   {"vectors", &Reader::TakeVectors},
        {"adds", &Reader::TakeAdds},       {"experts", &Reader::TakeExperts},
        {"streams", &Reader::TakeStreams}, {"altup", &Reader::TakeAltUp},   {"laurel", &Reader::TakeLaurel},
    };
    const auto found = kWords.find(word);
    if (found == kWords.end()) line.Fail("'" + word + "' is not known");
    (this->*found->second)(line);
    line.Done();
  }

  Plan Finish() {
    if (!begun_) throw Error("plan: it is empty");
    if (static_cast<long>(plan_.layers.size()) != expected_)
      throw Error("plan: " + std::to_string(plan_.layers.size()) + " layers, not " + std::to_string(expected_));
    for (size_t i = 0; i < plan_.layers.size(); i++) Agree(i, plan_.layers[i]);
    plan_.first_sharing = static_cast<int>(plan_.layers.size());
    while (plan_.first_sharing > 0 && plan_.layers[plan_.first_sharing - 1].source < plan_.first_sharing - 1)
      plan_.first_sharing--;
    return std::move(plan_);
  }

 private:
  // That a layer has what goes with what all share.
  void Agree(size_t index, const LayerPlan& l) const {
    const auto agree = [&](bool has, const char* of_layer, bool shared, const char* of_all) {
      if (has != shared)
        throw Error("plan: layer " + std::to_string(index) + " has " + (has ? "" : "no ") + of_layer +
                    ", and there are " + (shared ? "" : "no ") + of_all);
    };
    agree(l.added.norm != nullptr, "'adds'", plan_.vectors.size != 0, "'vectors'");
    agree(l.altup.norm != nullptr, "'altup'", plan_.streams.count != 0, "'streams'");
  }

  // Rows are rounded once for all that read them.
  static void Together(const Line& line, std::initializer_list<const Matrix*> readers) {
    int rounding = kUnrounded;
    for (const Matrix* m : readers) {
      const int own = RoundingOf(*m);
      if (own != kUnrounded && rounding != kUnrounded && own != rounding)
        line.Fail("matrices that read the same inputs differ in 'input_group'");
      rounding = std::max(rounding, own);
    }
  }

  void TakeModel(Line& line) {
    if (begun_) line.Fail("'model' is there twice");
    begun_ = true;
    line.Whole("version", 1, 1);
    plan_.hidden = Multiple(line, "hidden", 16);
    plan_.vocabulary = static_cast<int>(line.Whole("vocabulary", 1));
    plan_.context = static_cast<int>(line.Whole("context", 1));
    expected_ = line.Whole("layers", 1, 4096);
    const std::string activation = line.Text("activation");
    if (activation != "gelu_pytorch_tanh" && activation != "gelu") line.Fail("activation " + activation);
    plan_.activation = activation == "gelu" ? 1 : 0;
    plan_.eps = line.Number("eps");
    plan_.embed_factor = line.Number("embed");
    plan_.cap = line.Number("cap");
    plan_.cache_form = line.Has("cache") ? FormOf(line, "cache") : kBFloat16;
    if (plan_.cache_form == kFloat16 || plan_.cache_form >= kInt4) line.Fail("'cache' has a form that caches have not");
    plan_.candidates = line.Has("candidates") ? static_cast<int>(line.Whole("candidates", 1)) : 0;
    offset_ = line.Number("offset");
    names_ = {line.Text("table"), line.Text("head"), line.Text("norm"), line.Has("columns") ? line.Text("columns") : ""};
  }

  // What a norm multiplies by: its weight and what the generation adds to it.
  const float* NormOf(Line& line, const std::string& key, int size) {
    const float* weight = VectorOf(line, key, size);
    return weight == nullptr ? nullptr : Shifted(weight, size);
  }

  const float* Shifted(const float* weight, int size) {
    plan_.norms.emplace_back(weight, weight + size);
    for (float& gain : plan_.norms.back()) gain += offset_;
    return plan_.norms.back().data();
  }

  const float* Times(const float* weight, int size, float factor) {
    plan_.norms.emplace_back(weight, weight + size);
    for (float& one : plan_.norms.back()) one *= factor;
    return plan_.norms.back().data();
  }

  const float* Inverse(Line& line, const std::string& key, const float* factor, int size) {
    if (factor == nullptr) return nullptr;
    plan_.norms.emplace_back(factor, factor + size);
    for (float& one : plan_.norms.back()) {
      if (!(one > 0) || !std::isfinite(1 / one)) line.Fail("'" + key + "' has a number that is not positive");
      one = 1 / one;
    }
    return plan_.norms.back().data();
  }

  static const float* Needed(const Line& line, const float* found, const std::string& key) {
    if (found == nullptr) line.Fail("no '" + key + "'");
    return found;
  }

  void TakeLayer(Line& line) {
    if (static_cast<long>(plan_.layers.size()) == expected_)
      line.Fail("more than " + std::to_string(expected_) + " layers");
    if (plan_.layers.empty()) TakeEnds(line);
    LayerPlan l{};
    const int hidden = plan_.hidden, index = static_cast<int>(plan_.layers.size());
    l.heads = static_cast<int>(line.Whole("heads", 1, 1024));
    l.kv_heads = static_cast<int>(line.Whole("kv_heads", 1, 1024));
    if (l.heads % l.kv_heads) line.Fail("'heads' is no multiple of 'kv_heads'");
    l.head_dim = Multiple(line, "head_dim", 32);
    if (l.head_dim > 512) line.Fail("'head_dim' is more than 512");
    l.width = Multiple(line, "width", 16);
    l.window = static_cast<int>(line.Whole("window", 0));
    l.factor = line.Number("factor");
    l.cap = line.Number("cap");
    l.sparse = line.Has("quantile");
    if (l.sparse) l.quantile = line.Number("quantile");
    const float* scalar = VectorOf(line, "scalar", 1);
    l.scalar = scalar == nullptr ? 1 : *scalar;
    l.source = static_cast<int>(line.Whole("source", 0, index));
    l.value_norm = line.Whole("value_norm", 0, 1) == 1;
    const int all = l.heads * l.head_dim, kept = l.kv_heads * l.head_dim;
    l.q = MatrixOf(line, line.Text("q"), all, hidden);
    if (l.source == index) {
      l.k = MatrixOf(line, line.Text("k"), kept, hidden);
      l.has_v = line.Has("v");
      if (l.has_v) l.v = MatrixOf(line, line.Text("v"), kept, hidden);
      l.k_norm = NormOf(line, "k_norm", l.head_dim);
      l.key_factor = VectorOf(line, "key_factor", kept);
      l.value_factor = VectorOf(line, "value_factor", kept);
      l.key_inverse = Inverse(line, "key_factor", l.key_factor, kept);
      l.value_inverse = Inverse(line, "value_factor", l.value_factor, kept);
    } else {
      const LayerPlan& from = plan_.layers[l.source];
      if (from.source != l.source || from.kv_heads != l.kv_heads || from.head_dim != l.head_dim ||
          from.window != l.window)
        line.Fail("layer " + std::to_string(l.source) + " has no keys and values for this one");
      l.key_factor = from.key_factor;
      l.value_factor = from.value_factor;
    }
    l.o = MatrixOf(line, line.Text("o"), hidden, all);
    l.gate = MatrixOf(line, line.Text("gate"), l.width, hidden);
    l.up = MatrixOf(line, line.Text("up"), l.width, hidden);
    l.down = MatrixOf(line, line.Text("down"), hidden, l.width);
    Together(line, {&l.q, &l.k, &l.v});
    Together(line, {&l.gate, &l.up});
    l.q_norm = NormOf(line, "q_norm", l.head_dim);
    l.input_norm = Needed(line, NormOf(line, "input_norm", hidden), "input_norm");
    l.pre_mlp_norm = Needed(line, NormOf(line, "pre_mlp_norm", hidden), "pre_mlp_norm");
    l.post_attention_norm = NormOf(line, "post_attention_norm", hidden);
    l.post_mlp_norm = NormOf(line, "post_mlp_norm", hidden);
    l.frequencies = Needed(line, VectorOf(line, "frequencies", l.head_dim / 2), "frequencies");
    plan_.layers.push_back(l);
  }

  // Vectors of tokens, for all layers.
  void TakeVectors(Line& line) {
    VectorsPlan& v = plan_.vectors;
    if (v.size != 0 || !plan_.layers.empty()) line.Fail("'vectors' come once, before all layers");
    v.size = Multiple(line, "size", kLanes);
    const long width = expected_ * v.size;
    v.table = TableOf(line, line.Text("table"), width);
    v.projection = MatrixOf(line, line.Text("projection"), static_cast<int>(width), plan_.hidden);
    v.norm = Needed(line, NormOf(line, "norm", v.size), "norm");
    v.table_factor = line.Number("table_factor");
    v.projection_factor = line.Number("projection_factor");
    v.factor = line.Number("factor");
  }

  // The layer that a line is about: the last one.
  LayerPlan& Last(Line& line) {
    if (plan_.layers.empty()) line.Fail("'" + line.word() + "' comes before all layers");
    return plan_.layers.back();
  }

  void TakeAdds(Line& line) {
    AddedPlan& a = Last(line).added;
    if (plan_.vectors.size == 0 || a.norm != nullptr) line.Fail("'adds' is there twice, or there are no 'vectors'");
    a.gate = MatrixOf(line, line.Text("gate"), plan_.vectors.size, plan_.hidden);
    a.projection = MatrixOf(line, line.Text("projection"), plan_.hidden, plan_.vectors.size);
    a.norm = Needed(line, NormOf(line, "norm", plan_.hidden), "norm");
  }

  void TakeExperts(Line& line) {
    ExpertsPlan& e = Last(line).experts;
    if (e.count != 0) line.Fail("'experts' is there twice");
    Needed(line, Last(line).post_mlp_norm, "post_mlp_norm' of the layer");
    const int hidden = plan_.hidden;
    e.count = static_cast<int>(line.Whole("count", 1, 1 << 16));
    e.chosen = static_cast<int>(line.Whole("chosen", 1, e.count));
    e.width = Multiple(line, "width", kLanes);
    for (const long rows : {2L * e.count * e.width, static_cast<long>(e.count) * hidden})
      if (rows > kLargest) line.Fail("all experts together have " + std::to_string(rows) + " rows");
    e.router = MatrixOf(line, line.Text("router"), e.count, hidden);
    e.gate_up = MatrixOf(line, line.Text("gate_up"), 2 * e.count * e.width, hidden);
    e.down = MatrixOf(line, line.Text("down"), e.count * hidden, e.width);
    e.scales = Needed(line, VectorOf(line, "scales", e.count), "scales");
    const float* scale = Needed(line, VectorOf(line, "router_scale", hidden), "router_scale");
    const float factor = line.Number("router_factor");
    e.router_norm = Times(scale, hidden, factor);
    e.dense_norm = Needed(line, NormOf(line, "dense_norm", hidden), "dense_norm");
    e.norm = Needed(line, NormOf(line, "norm", hidden), "norm");
    e.post_norm = Needed(line, NormOf(line, "post_norm", hidden), "post_norm");
  }

  void TakeStreams(Line& line) {
    StreamsPlan& s = plan_.streams;
    if (s.count != 0 || !plan_.layers.empty()) line.Fail("'streams' come once, before all layers");
    if (plan_.vectors.size == 0) line.Fail("'streams' come behind 'vectors'");
    s.count = static_cast<int>(line.Whole("count", 2, kMostStreams));
    s.active = static_cast<int>(line.Whole("active", 0, s.count - 1));
    for (int i = 1; i < s.count; i++) {
      const std::string number = std::to_string(i);
      s.enter.push_back(MatrixOf(line, line.Text("enter" + number), plan_.hidden, plan_.hidden));
      s.leave.push_back(MatrixOf(line, line.Text("leave" + number), plan_.hidden, plan_.hidden));
      Together(line, {&s.enter[0], &s.enter.back()});
    }
  }

  Matrix Float32(Line& line, const std::string& key, int rows, int columns) {
    const Matrix m = MatrixOf(line, line.Text(key), rows, columns);
    if (m.form != kFloat32) line.Fail("'" + key + "' is no matrix of float32");
    return m;
  }

  void TakeAltUp(Line& line) {
    AltUpPlan& a = Last(line).altup;
    const int count = plan_.streams.count, hidden = plan_.hidden;
    if (count == 0 || a.norm != nullptr) line.Fail("'altup' is there twice, or there are no 'streams'");
    a.router = Float32(line, "router", count, hidden);
    a.prediction = Float32(line, "prediction", count * count, count);
    a.correction = Float32(line, "correction", count, count);
    a.scale = Needed(line, VectorOf(line, "scale", hidden), "scale");
    const float* norm = Needed(line, NormOf(line, "norm", hidden), "norm");
    a.norm = Times(norm, hidden, line.Number("router_factor"));
  }

  void TakeLaurel(Line& line) {
    LaurelPlan& l = Last(line).laurel;
    if (l.rank != 0) line.Fail("'laurel' is there twice");
    l.rank = static_cast<int>(line.Whole("rank", 1));
    l.left = MatrixOf(line, line.Text("left"), l.rank, plan_.hidden);
    l.right = MatrixOf(line, line.Text("right"), plan_.hidden, l.rank);
    Together(line, {&Last(line).q, &Last(line).k, &l.left});
    l.norm = Needed(line, NormOf(line, "norm", plan_.hidden), "norm");
  }

  void TakeEnds(Line& line) {
    plan_.table = MatrixOf(line, names_[0], plan_.vocabulary, plan_.hidden, true);
    plan_.head = MatrixOf(line, names_[1], plan_.vocabulary, plan_.hidden, true);
    if ((plan_.head.form == kPlanes) != (plan_.candidates != 0))
      line.Fail(plan_.candidates != 0 ? "there are 'candidates', and the head is not in planes"
                                      : "the head is in planes, and there are no 'candidates'");
    plan_.columns = names_[3].empty() ? nullptr : VectorNamed(line, names_[3], plan_.hidden);
    plan_.final_norm = Shifted(VectorNamed(line, names_[2], plan_.hidden), plan_.hidden);
  }

  bool begun_ = false;
  long expected_ = 0;
  float offset_ = 0;
  std::vector<std::string> names_;
  Plan plan_{};
};

}  // namespace

Plan ReadPlan(const char* text, size_t size, const uint8_t* data, uint64_t bytes) {
  Reader reader(data, bytes);
  int number = 0;
  for (size_t at = 0; at < size;) {
    const void* found = std::memchr(text + at, '\n', size - at);
    const size_t end = found == nullptr ? size : static_cast<size_t>(static_cast<const char*>(found) - text);
    Line line(std::string(text + at, end - at), ++number);
    at = end + 1;
    if (!line.word().empty()) reader.Take(line);
  }
  return reader.Finish();
}

}  // namespace gemma
