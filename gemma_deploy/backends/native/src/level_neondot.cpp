// ARM with dot products of bytes.
#include "kernels.h"
namespace gemma {
const Kernels* const kNeonDot = nullptr;
}
