#include "levels.h"

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gemma {
namespace {

#if defined(__x86_64__) && defined(__linux__)
// Whether the processor has tiles of bytes, and the system lets this process use them: it has to be asked, once for all
// threads, and may refuse.
bool Tiles() {
  unsigned a, b, c, d;
  constexpr unsigned kTiles = 1u << 24, kBytes = 1u << 25, kSaved = 1u << 27;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & kSaved) == 0) return false;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & (kTiles | kBytes)) != (kTiles | kBytes)) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kKept = 3u << 17;  // registers that the system keeps for a process
  constexpr long kAsk = 0x1023, kData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if ((low & kKept) != kKept || syscall(SYS_arch_prctl, kAsk, kData) != 0) {
    std::fputs("gemma_deploy: this system does not let the program use AMX: the next level is taken\n", stderr);
    return false;
  }
  return true;
}
#elif defined(__x86_64__)
bool Tiles() { return false; }
#endif

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
  add(kAmx, avx512 && __builtin_cpu_supports("avx512vnni") && kAmx != nullptr && Tiles());
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
