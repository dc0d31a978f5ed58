// Threads that help: every piece is done once, whoever does it; and when helpers are sent to rest. A program of its own.
#include "pool.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>

using namespace gemma;

namespace {

void Expect(bool right, const char* what) {
  if (right) return;
  std::printf("wrong: %s\n", what);
  std::exit(1);
}

// Many small works one after another, of all sizes, in which every piece adds to a number of its own and reads what the
// work before has left.
void Once(int threads) {
  Pool pool(threads);
  std::vector<int> numbers(300, 0);
  std::vector<int> doers(threads, 0);
  int works = 0;
  pool.Run(1, [&](Worker& worker) {
    for (; works < 20000; works++) {
      const int n = 1 + works * 7 % static_cast<int>(numbers.size());
      worker.Each(n, [&](int i) {
        numbers[i]++;
        doers[Worker::index()]++;
      });
      if (works % 1000 == 0) std::this_thread::sleep_for(std::chrono::microseconds(300));  // helpers go to sleep
    }
  });
  std::vector<int> right(numbers.size(), 0);
  for (int w = 0; w < works; w++)
    for (int i = 0; i < 1 + w * 7 % static_cast<int>(right.size()); i++) right[i]++;
  Expect(numbers == right, "a piece was done twice, or not at all");
  Expect(std::accumulate(doers.begin(), doers.end(), 0) == std::accumulate(right.begin(), right.end(), 0), "a thread has another's number");
  if (threads > 1) Expect(pool.counts().helped + doers[0] >= pool.counts().pieces, "what helpers did is not counted");
}

// A helper that is held up within pieces, as by the scheduler, is not given any before long.
void HeldUp() {
  Pool pool(2);
  const auto start = std::chrono::steady_clock::now();
  for (int works = 0; works < 500; works++)
    pool.Run(1, [&](Worker& worker) {
      worker.Each(20, [&](int) {
        const int micros = Worker::index() == 0 ? 50 : 15000;
        const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(micros);
        while (std::chrono::steady_clock::now() < until) {
        }
      });
    });
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf("held up: %.2f s, %llu of %llu pieces by the helper, %llu rests, waited %.3f s\n", seconds,
              static_cast<unsigned long long>(pool.counts().helped), static_cast<unsigned long long>(pool.counts().pieces),
              static_cast<unsigned long long>(pool.counts().rests), pool.counts().waited);
  Expect(pool.counts().rests >= 1, "a helper that holds everything up was not sent to rest");
  Expect(pool.counts().helped < 100, "a helper that holds everything up was given more work");
}

// What Payoff says of steps that take so long with helpers and without, for some seconds: how many of them with.
struct Steps {
  Payoff payoff;
  double now = 0;
  bool helped = true;

  int Take(double with, double held, double without, double until, int rows = 1) {
    int count = 0;
    while (now < until) {
      count += helped;
      if (helped && held > 0) payoff.Waited(6, 6e-4, held);
      now += helped ? with : without;
      helped = payoff.Step(rows, helped ? with : without, now);
    }
    return count;
  }
};

void When() {
  Steps rest;  // a machine at rest: helpers save something, and the caller waits for half a piece
  Expect(rest.Take(6e-3, 1.5e-4, 10e-3, 5) >= 830 && rest.payoff.rests() == 0, "helpers that do half are sent to rest");
  Steps slow;  // on a busy one each step with them is held up
  Expect(slow.Take(20e-3, 12e-3, 10e-3, 100) < 100, "helpers that cost more than they give work on");
  Expect(slow.payoff.rests() == 6, "rests do not get longer: 1, 4, 16, 32, 32, 32 seconds");
  slow.Take(6e-3, 0, 10e-3, 140);
  Expect(slow.helped && slow.Take(6e-3, 0, 10e-3, 145) > 830, "helpers are not back where the machine is at rest again");
  Steps sooner;
  sooner.Take(80e-3, 48e-3, 40e-3, 40);
  Expect(sooner.payoff.rests() == 4 && !sooner.helped, "the fourth rest does not last from 21 seconds on");
  Expect(sooner.Take(6e-3, 0, 10e-3, 41) > 100, "a rest goes on where the machine is no longer busy");
  Steps held;  // held up now and then, and worth it still
  Expect(held.Take(7e-3, 2e-3, 10e-3, 30) > 3500, "helpers are sent to rest that save more than is waited for");
  Expect(held.payoff.rests() == 0, "helpers that pay off rest");
  Steps mixed;  // steps of other sizes are not compared
  for (int i = 0; i < 200; i++) mixed.Take(20e-3, 12e-3, 10e-3, mixed.now + 1e-3, 1 << i % 3 * 2);
  Expect(mixed.payoff.rests() == 0, "steps of different sizes are compared");
  mixed.Take(20e-3, 12e-3, 10e-3, mixed.now + 0.5);
  Expect(mixed.payoff.rests() == 1 && !mixed.helped, "helpers do not rest");
  for (int i = 0; i < 200; i++) mixed.Take(20e-3, 12e-3, 10e-3, mixed.now + 1e-3, 1 << i % 3 * 2);
  Expect(mixed.helped, "a rest never ends where steps of all sizes come");
}

}  // namespace

int main() {
  When();
  for (int threads : {1, 2, 3, 5}) Once(threads);
  HeldUp();
  return 0;
}
