// Calls of the C ABI with arguments drawn at random, many of them wrong, and plans that are damaged at random: what is wrong
// is answered with a message, and what is right has the bits that it has in a model nobody disturbed.
//
// fuzz PLAN PARAMETERS SEED SECONDS: files of an artifact. Pointers are null, or to memory of the size that the ABI says:
// more than that a library can not see. Run with sanitizers by scripts/sanitize_native.py.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "ranking.h"

struct Handle;
struct GemmaPiece {
  int32_t sequence, count, wanted, unused;
  const int32_t* tokens;
};

extern "C" {
const char* gemma_levels();
Handle* gemma_open(const char*, size_t, const char*, const char*, int, uint64_t, const char*, int, char*, size_t);
void gemma_close(Handle*);
const char* gemma_error(const Handle*);
uint64_t gemma_stride(const Handle*);
int gemma_hidden(const Handle*);
int gemma_vocabulary(const Handle*);
int gemma_context(const Handle*);
uint64_t gemma_cache_used(const Handle*);
int gemma_sequence_new(Handle*, int);
int gemma_sequence_free(Handle*, int);
int gemma_sequence_length(Handle*, int);
int gemma_sequence_rewind(Handle*, int, int);
int gemma_step(Handle*, const GemmaPiece*, int, float*, float*, int);
int gemma_step_ranked(Handle*, const GemmaPiece*, int, const gemma::Ranks*, int);
int gemma_threads(Handle*, uint64_t*);
int gemma_head(Handle*, const float*, int, float*);
int gemma_rank(Handle*, const float*, int, const gemma::Ranks*);
}

namespace {

std::mt19937 draw;
int answered = 0, refused = 0, full = 0;

int Below(int n) { return static_cast<int>(draw() % static_cast<unsigned>(n)); }

// Often a number that is right, and else one that is wrong in a way that programs get wrong.
int Maybe(int right) {
  static const int kOdd[] = {0, -1, 1, 2, 1 << 20, 1 << 30, 0x7fffffff, -0x7fffffff - 1, 65536, 4097};
  return Below(8) != 0 ? right : Below(2) == 0 ? kOdd[Below(10)] : right + Below(3) - 1;
}

void Die(const char* what, const char* detail = "") {
  std::printf("%s %s\n", what, detail);
  std::exit(1);
}

// A call's status: 0, or 1 with a message, or 2 where memory for caches is out.
int Seen(Handle* model, int status) {
  if (status == 0) answered++;
  if (status == 1 || status == 3) refused++;
  if (status == 2) full++;
  if (status < 0 || status > 3) Die("a status that is none");
  if ((status == 1 || status == 3) && std::strlen(gemma_error(model)) == 0) Die("refused without a message");
  return status;
}

std::string File(const char* path) {
  std::ifstream in(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(in), {});
}

Handle* Open(const std::string& plan, const char* parameters, int threads, uint64_t bytes, const char* form, std::string* error) {
  char message[200] = "";
  Handle* made = gemma_open(plan.data(), plan.size(), parameters, "", threads, bytes, form, 0, message, sizeof message);
  if (made == nullptr && message[0] == 0) Die("not opened, without a message");
  *error = message;
  return made;
}

// A text that the model is asked about after all that was done to it.
std::vector<float> Known(Handle* model) {
  std::vector<int32_t> tokens;
  for (int i = 0; i < 40; i++) tokens.push_back((i * 37 + 5) % gemma_vocabulary(model));
  std::vector<float> logits(3 * gemma_stride(model));
  const int sequence = gemma_sequence_new(model, 0);
  const GemmaPiece piece{sequence, 40, 3, 0, tokens.data()};
  if (gemma_step(model, &piece, 1, nullptr, logits.data(), 3) != 0) Die("a right call is refused:", gemma_error(model));
  gemma_sequence_free(model, sequence);
  return logits;
}

void Calls(Handle* model, int count) {
  const int vocabulary = gemma_vocabulary(model), context = gemma_context(model);
  const size_t stride = gemma_stride(model), hidden = static_cast<size_t>(gemma_hidden(model));
  std::map<int, int> lengths;
  const auto any = [&] {
    if (lengths.empty()) return Maybe(1);
    auto at = lengths.begin();
    std::advance(at, Below(static_cast<int>(lengths.size())));
    return Maybe(at->first);
  };
  for (int i = 0; i < count; i++) {
    switch (Below(8)) {
      case 0: {
        const int like = Below(3) == 0 ? any() : 0, made = gemma_sequence_new(model, like);
        if (made == 0 && std::strlen(gemma_error(model)) == 0) Die("no sequence, without a message");
        if (made != 0 && lengths.count(made) != 0) Die("a sequence's number is another's");
        if (made != 0) lengths[made] = like == 0 ? 0 : lengths.at(like);
        break;
      }
      case 1: {
        const int one = any();
        if (Below(2) == 0 && Seen(model, gemma_sequence_free(model, one)) == 0 && lengths.erase(one) != 1) Die("freed what was not there");
        break;
      }
      case 2: {
        const int one = any(), length = Maybe(lengths.count(one) != 0 ? lengths[one] - Below(30) : 0);
        if (Seen(model, gemma_sequence_rewind(model, one, length)) == 0) {
          if (length < 0 || length > lengths.at(one)) Die("went back to what was not there");
          lengths[one] = length;
        }
        break;
      }
      case 3: {
        const int rows = Maybe(1 + Below(5));
        std::vector<float> normed(5 * hidden + 1, 0.5f), logits(5 * stride + 1);
        // As many rows as there is memory for, or a number that is refused.
        if (rows <= 5 || rows > (1 << 20))
          Seen(model, gemma_head(model, Below(9) == 0 ? nullptr : normed.data(), rows, Below(9) == 0 ? nullptr : logits.data()));
        std::vector<float> sums(5);
        const gemma::Ranks ranks{Maybe(3), nullptr, nullptr, Below(4) == 0 ? nullptr : sums.data(), nullptr, nullptr};
        if (rows <= 5 || rows > (1 << 20))
          Seen(model, gemma_rank(model, Below(9) == 0 ? nullptr : logits.data(), rows, Below(9) == 0 ? nullptr : &ranks));
        uint64_t numbers[4];
        Seen(model, gemma_threads(model, Below(5) == 0 ? nullptr : numbers));
        break;
      }
      default: {
        std::vector<std::vector<int32_t>> tokens(1 + Below(4));
        std::vector<GemmaPiece> pieces;
        int wanted = 0;
        for (auto& some : tokens) {
          some.resize(1 + Below(Below(4) == 0 ? 60 : 3));
          for (int32_t& token : some) token = Below(300) == 0 ? Maybe(-1) : Below(vocabulary);
          const int most = static_cast<int>(some.size());
          int size = Maybe(most);
          if (size > most && size <= (1 << 20)) size = most;  // more than a text may have, or what is there
          pieces.push_back(GemmaPiece{any(), size, Maybe(Below(most + 1)), 0, Below(60) == 0 ? nullptr : some.data()});
          wanted += std::min(std::max(0, pieces.back().wanted), most);
        }
        const int rows = std::min(wanted, 300), given = Below(30) == 0 ? Maybe(0) : static_cast<int>(pieces.size());
        if (given > static_cast<int>(pieces.size()) && given <= 4096) break;
        int status;
        if (Below(2) == 0) {
          std::vector<float> normed(rows * hidden + 1), logits(rows * stride + 1);
          status = gemma_step(model, Below(60) == 0 ? nullptr : pieces.data(), given, Below(3) == 0 ? nullptr : normed.data(),
                              Below(3) == 0 ? nullptr : logits.data(), Maybe(rows) > rows ? rows : rows - (Below(20) == 0));
        } else {
          const int top = Maybe(Below(20)), room = std::max(0, std::min(top, 1024));
          std::vector<int32_t> ids(static_cast<size_t>(rows) * room + 1), asked(rows + 1, 0);
          std::vector<float> logits(ids.size()), sums(rows + 1), of_asked(rows + 1);
          for (int32_t& one : asked) one = Below(400) == 0 ? Maybe(-1) : Below(vocabulary);
          const bool asks = Below(2) == 0, half = Below(40) == 0;
          const gemma::Ranks ranks{top, Below(4) == 0 ? nullptr : ids.data(), Below(4) == 0 ? nullptr : logits.data(),
                                   Below(4) == 0 ? nullptr : sums.data(), asks ? asked.data() : nullptr,
                                   asks && !half ? of_asked.data() : nullptr};
          status = gemma_step_ranked(model, pieces.data(), given, Below(60) == 0 ? nullptr : &ranks, rows);
        }
        if (Seen(model, status) != 0) break;
        for (int p = 0; p < given; p++) {
          int& length = lengths.at(pieces[p].sequence);
          length += pieces[p].count;
          if (length > context) Die("longer than the context");
        }
      }
    }
    for (const auto& [one, length] : lengths)
      if (gemma_sequence_length(model, one) != length) Die("a sequence has another length");
    if (lengths.size() > 12) Seen(model, gemma_sequence_free(model, lengths.begin()->first)), lengths.erase(lengths.begin());
  }
  for (const auto& [one, length] : lengths) gemma_sequence_free(model, one);
  if (gemma_cache_used(model) != 0) Die("pages are lost");
}

std::string Damaged(std::string plan) {
  const int times = 1 + Below(3);
  for (int t = 0; t < times && !plan.empty(); t++) {
    const size_t at = draw() % plan.size();
    switch (Below(6)) {
      case 0:
        plan[at] = static_cast<char>(Below(256));
        break;
      case 1:
        plan.erase(at, 1 + Below(40));
        break;
      case 2:
        plan.insert(at, plan.substr(draw() % plan.size(), Below(60)));
        break;
      case 3:
        plan.resize(at);
        break;
      default: {  // another number
        size_t digit = plan.find_first_of("0123456789", at);
        if (digit == std::string::npos) break;
        const size_t end = std::min(plan.find_first_not_of("0123456789", digit), plan.size());
        static const char* const kNumbers[] = {"0", "1", "16", "64", "4096", "16777216", "99999999999999999999", "18446744073709551552", "-1", "3.5"};
        plan.replace(digit, end - digit, kNumbers[Below(10)]);
      }
    }
  }
  return plan;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) Die("fuzz PLAN PARAMETERS SEED SECONDS");
  const std::string plan = File(argv[1]);
  draw.seed(static_cast<unsigned>(std::atoi(argv[3])));
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(std::atoi(argv[4]));
  std::string error;
  int opened = 0, tried = 0;
  Handle* first = Open(plan, argv[2], 1, 1 << 26, "", &error);
  if (first == nullptr) Die("not opened:", error.c_str());
  const std::vector<float> known = Known(first);
  gemma_close(first);
  gemma_close(nullptr);
  do {
    Handle* model = Open(plan, argv[2], 1 + Below(3), Below(2) == 0 ? 1 << 26 : 1 << 19, "", &error);
    if (model == nullptr) Die("not opened:", error.c_str());
    Calls(model, 60);
    if (std::memcmp(Known(model).data(), known.data(), known.size() * 4) != 0) Die("other bits after other calls");
    gemma_close(model);
    for (int i = 0; i < 10; i++, tried++) {
      Handle* strange = Open(Damaged(plan), argv[2], Maybe(1) == 1 ? 1 : 2, 1 << 22, Below(9) == 0 ? "int3" : "", &error);
      if (strange == nullptr) continue;
      opened++;  // what is still a model is computed, whatever it gives
      if (gemma_context(strange) >= 40 && gemma_vocabulary(strange) >= 16) {
        const int32_t token = 7;
        const int sequence = gemma_sequence_new(strange, 0);
        const GemmaPiece piece{sequence, 1, 1, 0, &token};
        std::vector<float> logits(gemma_stride(strange));
        Seen(strange, gemma_step(strange, &piece, 1, nullptr, logits.data(), 1));
      }
      gemma_close(strange);
    }
  } while (std::chrono::steady_clock::now() < until);
  std::printf("%d calls answered, %d refused, %d without memory; of %d damaged plans %d opened\n", answered, refused, full, tried, opened);
  return 0;
}
