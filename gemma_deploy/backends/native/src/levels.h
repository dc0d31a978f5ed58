// Which levels there are on this processor, and which is used.
#pragma once

#include "kernels.h"

namespace gemma {

// The level of that name, if this processor runs it; the best one for an empty name. Null: there is none.
const Kernels* Level(const char* name);

// Names of the levels that this processor runs, the best first: `avx512vnni avx2 plain`.
const char* LevelNames();

}  // namespace gemma
