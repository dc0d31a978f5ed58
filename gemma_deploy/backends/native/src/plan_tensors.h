// The tensors of a plan by their names, each of whose bytes lie within the parameter file.
#pragma once

#include <cerrno>
#include <cstdlib>
#include <map>
#include <string>
#include <utility>

#include "layout.h"
#include "mapped.h"
#include "plan_line.h"
#include "row_table.h"

namespace gemma {

constexpr uint64_t kAligned = 64;

class Tensors {
 public:
  Tensors(const uint8_t* data, uint64_t bytes) : data_(data), bytes_(bytes) {}

  void TakeMatrix(Line& line) {
    const std::string name = line.Text("name");
    Matrix m{};
    m.form = FormOf(line, "form");
    m.rows = Multiple(line, "rows", kLanes);
    m.columns = Multiple(line, "columns", m.form >= kInt4 ? 2 * kBlock : kBlock);
    const uint64_t planes = m.form == kPlanes ? 2 : 1;
    m.panels = Place(line, "at", planes * (m.rows / kLanes) * PanelBytes(m.form, m.columns));
    if (m.form >= kInt8) {
      m.group = static_cast<int32_t>(line.Whole("group", 0, kSpan));
      const bool power = (m.group & (m.group - 1)) == 0;
      if (m.group != 0 && (m.group < kSums || !power || m.columns % m.group))
        line.Fail("'group' is " + std::to_string(m.group) + ", no power of two from 32 that divides the columns");
      m.scale_form = FormOf(line, "scales");
      if (m.scale_form >= kInt8) line.Fail("'scales' are no floats");
      const uint64_t scales = static_cast<uint64_t>(m.rows) * (m.group == 0 ? 1 : m.columns / m.group);
      m.scales = Place(line, "scales_at", scales * (m.scale_form == kFloat32 ? 4 : 2));
      if (line.Has("input_group")) {
        m.input_group = static_cast<int32_t>(line.Whole("input_group", kSums, kSpan));
        if ((m.input_group & (m.input_group - 1)) != 0)
          line.Fail("'input_group' is " + std::to_string(m.input_group) + ", no power of two");
        if (m.form == kPlanes) line.Fail("'input_group' is there, of a matrix in planes");
      }
    }
    if (!matrices_.emplace(name, m).second) line.Fail("'" + name + "' is there twice");
  }

  void TakeTable(Line& line) {
    const std::string name = line.Text("name");
    RowTable t{};
    t.form = FormOf(line, "form");
    if (t.form == kPlanes) line.Fail("'form' is one that no table has");
    t.rows = static_cast<int32_t>(line.Whole("rows", 1));
    t.columns = Multiple(line, "columns", 2);
    const uint64_t numbers = static_cast<uint64_t>(t.rows) * t.columns;
    const int bits = t.form == kInt4 ? 4 : t.form == kInt8 ? 8 : t.form == kFloat32 ? 32 : 16;
    t.values = Place(line, "at", numbers * bits / 8);
    ReadHereAndThere(t.values, numbers * bits / 8);
    if (t.form >= kInt8) {
      t.group = static_cast<int32_t>(line.Whole("group", 1, t.columns));
      if (t.columns % t.group)
        line.Fail("'group' is " + std::to_string(t.group) + ", which does not divide the columns");
      t.scales = reinterpret_cast<const float*>(Place(line, "scales_at", numbers / t.group * 4));
    }
    if (!tables_.emplace(name, t).second) line.Fail("'" + name + "' is there twice");
  }

  void TakeVector(Line& line) {
    const std::string name = line.Text("name");
    const int size = Multiple(line, "size", kLanes);
    const uint8_t* at = Place(line, "at", static_cast<uint64_t>(size) * 4);
    if (!vectors_.emplace(name, std::make_pair(reinterpret_cast<const float*>(at), size)).second)
      line.Fail("'" + name + "' is there twice");
  }

  // The matrix that a line names, of `rows` outputs and `columns` inputs, both before padding; `planes`: it may be so.
  Matrix MatrixOf(const Line& line, const std::string& name, int rows, int columns, bool planes = false) const {
    const auto found = matrices_.find(name);
    if (found == matrices_.end()) line.Fail("no matrix '" + name + "'");
    const Matrix& m = found->second;
    if (m.form == kPlanes && !planes) line.Fail("'" + name + "' is in planes, which only table and head are");
    const int block = m.form >= kInt4 ? 2 * kBlock : kBlock;
    if (m.rows != (rows + kLanes - 1) / kLanes * kLanes || m.columns != (columns + block - 1) / block * block)
      line.Fail("'" + name + "' is " + std::to_string(m.rows) + " x " + std::to_string(m.columns) + ", not " +
                std::to_string(rows) + " x " + std::to_string(columns));
    return m;
  }

  // The table that a line names, of so many columns.
  RowTable TableOf(const Line& line, const std::string& name, long columns) const {
    const auto found = tables_.find(name);
    if (found == tables_.end()) line.Fail("no table '" + name + "'");
    const RowTable& t = found->second;
    if (t.columns != columns)
      line.Fail("'" + name + "' has " + std::to_string(t.columns) + " columns, not " + std::to_string(columns));
    return t;
  }

  // The vector of that name, of `size` numbers before padding.
  const float* VectorNamed(const Line& line, const std::string& name, int size) const {
    const auto found = vectors_.find(name);
    if (found == vectors_.end()) line.Fail("no vector '" + name + "'");
    if (found->second.second != (size + kLanes - 1) / kLanes * kLanes)
      line.Fail("'" + name + "' has room for " + std::to_string(found->second.second) + " numbers, not for " +
                std::to_string(size));
    return found->second.first;
  }

  // The one that a line names under a key; null where it has no such key.
  const float* VectorOf(Line& line, const std::string& key, int size) const {
    return line.Has(key) ? VectorNamed(line, line.Text(key), size) : nullptr;
  }

  static int Multiple(Line& line, const std::string& key, int of) {
    const long value = line.Whole(key, of);
    if (value % of) line.Fail("'" + key + "' is " + std::to_string(value) + ", no multiple of " + std::to_string(of));
    return static_cast<int>(value);
  }

  static int32_t FormOf(Line& line, const std::string& key) {
    static const std::map<std::string, int32_t> kForms = {{"float32", kFloat32},
                                                          {"float16", kFloat16},
                                                          {"bfloat16", kBFloat16},
                                                          {"int8", kInt8},
                                                          {"int4", kInt4},
                                                          {"planes", kPlanes}};
    const std::string name = line.Text(key);
    const auto found = kForms.find(name);
    if (found == kForms.end()) line.Fail("'" + key + "' is " + name);
    return found->second;
  }

 private:
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

  const uint8_t* data_;
  uint64_t bytes_;
  std::map<std::string, Matrix> matrices_;
  std::map<std::string, RowTable> tables_;
  std::map<std::string, std::pair<const float*, int>> vectors_;
};

}  // namespace gemma
