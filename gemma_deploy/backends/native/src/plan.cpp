#include "plan.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <cstring>

namespace gemma {
namespace {

constexpr long kLargest = 1L << 24;  // of any size in a plan
constexpr uint64_t kAligned = 64;

// One line: a word, and pairs that are taken out as they are read, so that what is left over can be told.
class Line {
 public:
  Line(const std::string& text, int number) : number_(number) {
    size_t at = 0;
    while (at < text.size()) {
      size_t end = text.find(' ', at);
      if (end == std::string::npos) end = text.size();
      const std::string part = text.substr(at, end - at);
      at = end + 1;
      if (part.empty()) continue;
      const size_t equals = part.find('=');
      if (word_.empty() && equals == std::string::npos) {
        word_ = part;
      } else if (equals == std::string::npos || equals == 0) {
        Fail("'" + part + "' is no key=value");
      } else if (!pairs_.emplace(part.substr(0, equals), part.substr(equals + 1)).second) {
        Fail("'" + part.substr(0, equals) + "' is there twice");
      }
    }
  }

  const std::string& word() const { return word_; }

  [[noreturn]] void Fail(const std::string& what) const {
    throw Error("plan, line " + std::to_string(number_) + ": " + what);
  }

  std::string Text(const std::string& key) {
    const auto found = pairs_.find(key);
    if (found == pairs_.end()) Fail("no '" + key + "'");
    const std::string value = found->second;
    pairs_.erase(found);
    return value;
  }

  bool Has(const std::string& key) const { return pairs_.count(key) != 0; }

  long Whole(const std::string& key, long least, long most = kLargest) {
    const std::string text = Text(key);
    char* end = nullptr;
    errno = 0;
    const long value = std::strtol(text.c_str(), &end, 10);
    if (errno != 0 || end == text.c_str() || *end != 0 || value < least || value > most)
      Fail("'" + key + "' is " + text + ", not a whole number from " + std::to_string(least) + " to " +
           std::to_string(most));
    return value;
  }

  float Number(const std::string& key) {
    const std::string text = Text(key);
    char* end = nullptr;
    const float value = std::strtof(text.c_str(), &end);
    if (end == text.c_str() || *end != 0 || !std::isfinite(value)) Fail("'" + key + "' is " + text + ", not a number");
    return value;
  }

  void Done() const {
    if (!pairs_.empty()) Fail("'" + pairs_.begin()->first + "' is not known");
  }

 private:
  int number_;
  std::string word_;
  std::map<std::string, std::string> pairs_;
};

class Reader {
 public:
  Reader(const uint8_t* data, uint64_t bytes) : data_(data), bytes_(bytes) {}

  void Take(Line& line) {
    const std::string& word = line.word();
    if (!begun_ && word != "model") line.Fail("a plan begins with 'model'");
    if (word == "model") {
      TakeModel(line);
    } else if (word == "matrix") {
      TakeMatrix(line);
    } else if (word == "vector") {
      TakeVector(line);
    } else if (word == "layer") {
      TakeLayer(line);
    } else {
      line.Fail("'" + word + "' is not known");
    }
    line.Done();
  }

  Plan Finish() {
    if (!begun_) throw Error("plan: it is empty");
    if (static_cast<long>(plan_.layers.size()) != expected_)
      throw Error("plan: " + std::to_string(plan_.layers.size()) + " layers, not " + std::to_string(expected_));
    return std::move(plan_);
  }

 private:
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
    offset_ = line.Number("offset");
    names_ = {line.Text("table"), line.Text("head"), line.Text("norm")};
  }

  int Multiple(Line& line, const std::string& key, int of) {
    const long value = line.Whole(key, of);
    if (value % of) line.Fail("'" + key + "' is " + std::to_string(value) + ", no multiple of " + std::to_string(of));
    return static_cast<int>(value);
  }

  // Bytes at..at + size of the parameter file.
  const uint8_t* Place(Line& line, const std::string& key, uint64_t size) {
    const std::string text = line.Text(key);
    char* end = nullptr;
    errno = 0;
    const uint64_t at = std::strtoull(text.c_str(), &end, 10);
    if (errno != 0 || end == text.c_str() || *end != 0 || text[0] == '-') line.Fail("'" + key + "' is " + text);
    if (at % kAligned != 0) line.Fail("'" + key + "' is no multiple of 64");
    if (at > bytes_ || size > bytes_ - at)
      line.Fail("'" + key + "': bytes " + text + " to " + std::to_string(at + size) + " of a parameter file of " +
                std::to_string(bytes_));
    return data_ + at;
  }

  static int32_t FormOf(Line& line, const std::string& key) {
    static const std::map<std::string, int32_t> kForms = {{"float32", kFloat32},
                                                          {"float16", kFloat16},
                                                          {"bfloat16", kBFloat16},
                                                          {"int8", kInt8},
                                                          {"int4", kInt4}};
    const std::string name = line.Text(key);
    const auto found = kForms.find(name);
    if (found == kForms.end()) line.Fail("'" + key + "' is " + name);
    return found->second;
  }

  void TakeMatrix(Line& line) {
    const std::string name = line.Text("name");
    Matrix m{};
    m.form = FormOf(line, "form");
    m.rows = Multiple(line, "rows", kLanes);
    m.columns = Multiple(line, "columns", m.form == kInt4 ? 2 * kBlock : kBlock);
    m.panels = Place(line, "at", m.rows / kLanes * PanelBytes(m.form, m.columns));
    if (m.form >= kInt8) {
      m.group = static_cast<int32_t>(line.Whole("group", 0, kSpan));
      const bool power = (m.group & (m.group - 1)) == 0;
      if (m.group != 0 && (m.group < kSums || !power || m.columns % m.group))
        line.Fail("'group' is " + std::to_string(m.group) + ", no power of two from 32 that divides the columns");
      m.scale_form = FormOf(line, "scales");
      if (m.scale_form >= kInt8) line.Fail("'scales' are no floats");
      const uint64_t scales = static_cast<uint64_t>(m.rows) * (m.group == 0 ? 1 : m.columns / m.group);
      m.scales = Place(line, "scales_at", scales * (m.scale_form == kFloat32 ? 4 : 2));
    }
    if (!matrices_.emplace(name, m).second) line.Fail("'" + name + "' is there twice");
  }

  void TakeVector(Line& line) {
    const std::string name = line.Text("name");
    const int size = Multiple(line, "size", kLanes);
    const uint8_t* at = Place(line, "at", static_cast<uint64_t>(size) * 4);
    if (!vectors_.emplace(name, std::make_pair(reinterpret_cast<const float*>(at), size)).second)
      line.Fail("'" + name + "' is there twice");
  }

  // The matrix that a line names, of `rows` outputs and `columns` inputs, both before padding.
  Matrix MatrixOf(Line& line, const std::string& name, int rows, int columns) {
    const auto found = matrices_.find(name);
    if (found == matrices_.end()) line.Fail("no matrix '" + name + "'");
    const Matrix& m = found->second;
    const int block = m.form == kInt4 ? 2 * kBlock : kBlock;
    if (m.rows != (rows + kLanes - 1) / kLanes * kLanes || m.columns != (columns + block - 1) / block * block)
      line.Fail("'" + name + "' is " + std::to_string(m.rows) + " x " + std::to_string(m.columns) + ", not " +
                std::to_string(rows) + " x " + std::to_string(columns));
    return m;
  }

  const float* VectorOf(Line& line, const std::string& key, int size) {
    if (!line.Has(key)) return nullptr;
    const std::string name = line.Text(key);
    const auto found = vectors_.find(name);
    if (found == vectors_.end()) line.Fail("no vector '" + name + "'");
    if (found->second.second != (size + kLanes - 1) / kLanes * kLanes)
      line.Fail("'" + name + "' has room for " + std::to_string(found->second.second) + " numbers, not for " +
                std::to_string(size));
    return found->second.first;
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

  static const float* Needed(const Line& line, const float* found, const std::string& key) {
    if (found == nullptr) line.Fail("no '" + key + "'");
    return found;
  }

  void TakeLayer(Line& line) {
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
    } else {
      const LayerPlan& from = plan_.layers[l.source];
      if (from.source != l.source || from.kv_heads != l.kv_heads || from.head_dim != l.head_dim ||
          from.window != l.window)
        line.Fail("layer " + std::to_string(l.source) + " has no keys and values for this one");
    }
    l.o = MatrixOf(line, line.Text("o"), hidden, all);
    l.gate = MatrixOf(line, line.Text("gate"), l.width, hidden);
    l.up = MatrixOf(line, line.Text("up"), l.width, hidden);
    l.down = MatrixOf(line, line.Text("down"), hidden, l.width);
    l.q_norm = NormOf(line, "q_norm", l.head_dim);
    l.input_norm = Needed(line, NormOf(line, "input_norm", hidden), "input_norm");
    l.pre_mlp_norm = Needed(line, NormOf(line, "pre_mlp_norm", hidden), "pre_mlp_norm");
    l.post_attention_norm = NormOf(line, "post_attention_norm", hidden);
    l.post_mlp_norm = NormOf(line, "post_mlp_norm", hidden);
    l.frequencies = Needed(line, VectorOf(line, "frequencies", l.head_dim / 2), "frequencies");
    plan_.layers.push_back(l);
  }

  void TakeEnds(Line& line) {
    plan_.table = MatrixOf(line, names_[0], plan_.vocabulary, plan_.hidden);
    plan_.head = MatrixOf(line, names_[1], plan_.vocabulary, plan_.hidden);
    const auto norm = vectors_.find(names_[2]);
    if (norm == vectors_.end() || norm->second.second != plan_.hidden) line.Fail("no norm '" + names_[2] + "'");
    plan_.final_norm = Shifted(norm->second.first, plan_.hidden);
  }

  const uint8_t* data_;
  uint64_t bytes_;
  bool begun_ = false;
  long expected_ = 0;
  float offset_ = 0;
  std::vector<std::string> names_;
  std::map<std::string, Matrix> matrices_;
  std::map<std::string, std::pair<const float*, int>> vectors_;
  Plan plan_{};
};

}  // namespace

Mapped::Mapped(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) throw Error(path + ": " + std::strerror(errno));
  struct stat about;
  if (fstat(file, &about) != 0 || !S_ISREG(about.st_mode) || about.st_size <= 0) {
    close(file);
    throw Error(path + ": no file with parameters");
  }
  size_ = static_cast<uint64_t>(about.st_size);
  void* at = mmap(nullptr, size_, PROT_READ, MAP_SHARED, file, 0);
  const int why = errno;
  close(file);
  if (at == MAP_FAILED) throw Error(path + ": " + std::strerror(why));
  data_ = static_cast<const uint8_t*>(at);
}

Mapped::~Mapped() { munmap(const_cast<uint8_t*>(data_), size_); }

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
