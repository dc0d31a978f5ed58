#include "levels.h"

#include <cstring>
#include <string>
#include <vector>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace gemma {
namespace {

std::vector<const Kernels*> Running() {
  std::vector<const Kernels*> found;
  const auto add = [&](const Kernels* level, bool runs) {
    if (level != nullptr && runs) found.push_back(level);
  };
#if defined(__x86_64__)
  // The compiler's own look at the processor: it asks the operating system for its registers as well.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  add(kAvx512Vnni, avx512 && __builtin_cpu_supports("avx512vnni"));
  add(kAvxVnni, avx2 && __builtin_cpu_supports("avxvnni"));
  add(kAvx2, avx2);
#endif
#if defined(__aarch64__) && defined(__linux__)
  add(kNeonDot, (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0);
#elif defined(__aarch64__)
  add(kNeonDot, true);  // every processor of Apple's has it
#endif
  add(kPlain, true);
  return found;
}

const std::vector<const Kernels*>& Levels() {
  static const std::vector<const Kernels*> levels = Running();
  return levels;
}

}  // namespace

const Kernels* Level(const char* name) {
  if (name == nullptr || *name == 0) return Levels().front();
  for (const Kernels* level : Levels())
    if (std::strcmp(level->name, name) == 0) return level;
  return nullptr;
}

const char* LevelNames() {
  static const std::string names = [] {
    std::string all;
    for (const Kernels* level : Levels()) all += (all.empty() ? "" : " ") + std::string(level->name);
    return all;
  }();
  return names.c_str();
}

}  // namespace gemma
