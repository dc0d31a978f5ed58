// Reads what an ONNX file is made of as far as a plan needs it: messages of protobuf, each a row of fields, and a field
// is a number and bytes or a message (https://protobuf.dev/programming-guides/encoding). Numbers of fields: onnx.proto.
#include "onnx_plan.h"

#include "error.h"

namespace gemma {
namespace {

constexpr char kDomain[] = "gemma.deploy", kOperator[] = "GemmaDecoder", kPlan[] = "plan";
constexpr uint32_t kGraphOfModel = 7, kNodeOfGraph = 1;
constexpr uint32_t kTypeOfNode = 4, kAttributeOfNode = 5, kDomainOfNode = 7;
constexpr uint32_t kNameOfAttribute = 1, kTextOfAttribute = 4;

// The fields of a message, one after another.
class Fields {
 public:
  Fields(const uint8_t* data, uint64_t size) : at_(data), end_(data + size) {}

  // Goes to the next field: false where there is none, or where what stands there is no field.
  bool Next() {
    uint64_t key = 0, length = 0;
    if (at_ == end_) return false;
    sound_ = Number(&key) && key <= UINT32_MAX;
    number_ = static_cast<uint32_t>(key >> 3);
    kind_ = static_cast<int>(key & 7);
    data_ = at_;
    size_ = 0;
    if (kind_ == 0) {
      sound_ = sound_ && Number(&length);
    } else if (kind_ == 1 || kind_ == 5) {
      sound_ = sound_ && Skip(kind_ == 1 ? 8 : 4);
    } else {
      sound_ = sound_ && kind_ == 2 && Number(&length);
      data_ = at_;
      size_ = length;
      sound_ = sound_ && Skip(length);
    }
    return sound_;
  }

  // Whether all that came so far were fields.
  bool sound() const { return sound_; }
  // Whether the field has that number, and bytes.
  bool Is(uint32_t number) const { return number_ == number && kind_ == 2; }
  Fields inside() const { return Fields(data_, size_); }
  std::string text() const { return std::string(reinterpret_cast<const char*>(data_), size_); }

 private:
  bool Number(uint64_t* value) {
    for (int shift = 0; shift < 64; shift += 7) {
      if (at_ == end_) return false;
      const uint8_t byte = *at_++;
      *value |= static_cast<uint64_t>(byte & 127) << shift;
      if (byte < 128) return true;
    }
    return false;
  }

  bool Skip(uint64_t bytes) {
    if (bytes > static_cast<uint64_t>(end_ - at_)) return false;
    at_ += bytes;
    return true;
  }

  const uint8_t *at_, *end_, *data_ = nullptr;
  uint64_t size_ = 0;
  uint32_t number_ = 0;
  int kind_ = 0;
  bool sound_ = true;
};

// What is looked for.
struct Found {
  std::string type, domain, plan;
  int nodes = 0, plans = 0;
};

bool Attribute(Fields fields, Found* found) {
  std::string name, text;
  bool has = false;
  while (fields.Next()) {
    if (fields.Is(kNameOfAttribute)) name = fields.text();
    if (!fields.Is(kTextOfAttribute)) continue;
    text = fields.text();
    has = true;
  }
  if (has && name == kPlan) {
    found->plan = std::move(text);
    found->plans++;
  }
  return fields.sound();
}

bool Node(Fields fields, Found* found) {
  bool sound = true;
  while (sound && fields.Next()) {
    if (fields.Is(kTypeOfNode)) found->type = fields.text();
    if (fields.Is(kDomainOfNode)) found->domain = fields.text();
    if (fields.Is(kAttributeOfNode)) sound = Attribute(fields.inside(), found);
  }
  found->nodes++;
  return sound && fields.sound();
}

bool Graph(Fields fields, Found* found) {
  bool sound = true;
  while (sound && fields.Next())
    if (fields.Is(kNodeOfGraph)) sound = Node(fields.inside(), found);
  return sound && fields.sound();
}

}  // namespace

std::string PlanIn(const uint8_t* data, uint64_t size, const std::string& path) {
  Found found;
  Fields fields(data, size);
  bool sound = true;
  while (sound && fields.Next())
    if (fields.Is(kGraphOfModel)) sound = Graph(fields.inside(), &found);
  if (!sound || !fields.sound()) throw Error(path + ": is not an ONNX graph");
  if (found.nodes != 1 || found.type != kOperator || found.domain != kDomain || found.plans != 1)
    throw Error(path + ": is not a graph of one " + kOperator + " with a plan");
  return found.plan;
}

}  // namespace gemma
