#pragma once

#include <cstdint>
#include <string>

namespace gemma {

// The plan in model.onnx of an artifact, which is a graph of one operator that has it as an attribute; `path` is for
// messages. Raises Error.
std::string PlanIn(const uint8_t* data, uint64_t size, const std::string& path);

}  // namespace gemma
