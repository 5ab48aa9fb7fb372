// Checks of team.h, run by test_team.py: `team_check NAME` runs one and returns 0 where it holds.
// `team_check time THREADS` prints the microseconds of a region and of a barrier.
#include <sched.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "team.h"

using pio::Team;
using pio::Worker;

namespace {

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "does not hold: %s\n", what);
  std::_Exit(1);
}

void every_worker_runs_once() {
  for (int size : {1, 2, 3, 8}) {
    std::vector<int> seen(size);
    Team::of(size).run([&](Worker& worker) {
      require(worker.count == size, "a worker knows how many there are");
      ++seen[worker.index];
    });
    require(seen == std::vector<int>(size, 1), "each worker runs the body once");
  }
}

void writes_are_seen_behind_a_barrier() {
  constexpr int kSize = 4, kRounds = 3000;
  std::vector<int> written(kSize);
  Team::of(kSize).run([&](Worker& worker) {
    for (int round = 1; round <= kRounds; ++round) {
      written[worker.index] = round;
      worker.barrier();
      const int total = std::accumulate(written.begin(), written.end(), 0);
      require(total == kSize * round, "what the others wrote is seen");
      worker.barrier();
    }
  });
}

void numbers_are_taken_once() {
  constexpr int kSize = 3, kTasks = 1000, kRounds = 50;
  std::vector<std::atomic<int>> taken(kTasks);
  Team::of(kSize).run([&](Worker& worker) {
    for (int round = 0; round < kRounds; ++round) {
      for (int64_t task; (task = worker.take()) < kTasks;) ++taken[task];
      worker.barrier();
    }
  });
  for (auto& count : taken) require(count == kRounds, "each number is taken once a round");
}

void callers_take_turns() {
  constexpr int kRegions = 300;
  std::atomic<int> inside{0}, total{0};
  const auto caller = [&] {
    for (int i = 0; i < kRegions; ++i) {
      Team::of(2).run([&](Worker& worker) {
        if (worker.index == 0) require(inside.exchange(1) == 0, "one region at a time");
        worker.barrier();
        ++total;
        worker.barrier();
        if (worker.index == 0) inside = 0;
      });
    }
  };
  std::thread first(caller), second(caller);
  first.join();
  second.join();
  require(total == 4 * kRegions, "every region ran on both workers");
}

void the_first_caller_may_end() {
  Team* team = nullptr;
  std::thread([&] {
    team = &Team::of(3);
    team->run([](Worker&) {});
  }).join();
  std::this_thread::sleep_for(std::chrono::milliseconds(20));  // the workers sleep by now
  std::atomic<int> ran{0};
  team->run([&](Worker&) { ++ran; });
  require(ran == 3, "the team outlives the thread that started it");
  require(team == &Team::of(3), "one team a size");
}

void a_region_within_a_region_is_refused() {
  std::atomic<int> refused{0};
  Team::of(2).run([&](Worker&) {
    try {
      Team::of(3).run([](Worker&) {});
    } catch (const std::logic_error&) {
      ++refused;
    }
  });
  require(refused == 2, "both workers were refused");
}

void a_forked_child_has_a_team() {
  Team::of(2).run([](Worker&) {});
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    std::atomic<int> ran{0};
    Team::of(2).run([&](Worker&) { ++ran; });
    std::_Exit(ran == 2 ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  require(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child's region ran on two workers");
}

void threads_are_named_and_deaf_to_signals() {
  Team::of(3).run([](Worker&) {});
  int found = 0;
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
    std::string name;
    std::getline(std::ifstream(task.path() / "comm"), name);
    if (name != "pio-kernel-1" && name != "pio-kernel-2") continue;
    ++found;
    std::ifstream status(task.path() / "status");
    for (std::string line; std::getline(status, line);) {
      if (line.starts_with("SigBlk:")) {
        const uint64_t blocked = std::stoull(line.substr(7), nullptr, 16);
        require((blocked >> (SIGINT - 1) & 1) != 0, "SIGINT is for other threads");
      }
    }
  }
  require(found == 2, "both workers have their names");
}

int cpus_of_this_thread() {
  cpu_set_t set;
  require(sched_getaffinity(0, sizeof set, &set) == 0, "the set has room for all CPUs");
  return CPU_COUNT(&set);
}

void a_team_with_a_thread_for_every_cpu_is_pinned() {
  const int cpus = cpus_of_this_thread();
  std::vector<int> at(cpus, -1);
  Team::of(cpus).run([&](Worker& worker) {
    if (worker.index > 0) {
      require(cpus_of_this_thread() == 1, "a worker has one CPU");
      at[worker.index] = sched_getcpu();
    }
  });
  std::sort(at.begin() + 1, at.end());
  require(std::adjacent_find(at.begin() + 1, at.end()) == at.end(), "each worker has its own CPU");
  require(cpus_of_this_thread() == cpus, "the caller keeps its place");
  Team::of(cpus + 1).run([&](Worker&) {
    require(cpus_of_this_thread() == cpus, "another team runs where it can");
  });
}

double microseconds(int count, const std::function<void()>& work) {
  work();
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < count; ++i) work();
  const std::chrono::duration<double, std::micro> passed = std::chrono::steady_clock::now() - start;
  return passed.count() / count;
}

void time(int size) {
  constexpr int kBarriers = 1000;
  Team& team = Team::of(size);
  const double region = microseconds(2000, [&] { team.run([](Worker&) {}); });
  const double barriers = microseconds(20, [&] {
    team.run([](Worker& worker) {
      for (int i = 0; i < kBarriers; ++i) worker.barrier();
    });
  });
  const double asleep = microseconds(50, [&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(3));
    team.run([](Worker&) {});
  });
  const double pause = microseconds(50, [] {
    std::this_thread::sleep_for(std::chrono::milliseconds(3));
  });
  std::printf("region %.2f us, after 3 ms of sleep %.1f us, barrier %.3f us\n", region,
              asleep - pause, barriers / kBarriers);
}

}  // namespace

int main(int count, char** arguments) {
  const std::map<std::string, void (*)()> checks = {
      {"every_worker_runs_once", every_worker_runs_once},
      {"writes_are_seen_behind_a_barrier", writes_are_seen_behind_a_barrier},
      {"numbers_are_taken_once", numbers_are_taken_once},
      {"callers_take_turns", callers_take_turns},
      {"the_first_caller_may_end", the_first_caller_may_end},
      {"a_region_within_a_region_is_refused", a_region_within_a_region_is_refused},
      {"a_forked_child_has_a_team", a_forked_child_has_a_team},
      {"threads_are_named_and_deaf_to_signals", threads_are_named_and_deaf_to_signals},
      {"a_team_with_a_thread_for_every_cpu_is_pinned",
       a_team_with_a_thread_for_every_cpu_is_pinned},
  };
  const std::string name = count > 1 ? arguments[1] : "";
  if (name == "time") {
    time(count > 2 ? std::atoi(arguments[2]) : 2);
  } else if (name == "list") {
    for (const auto& [check, run] : checks) std::puts(check.c_str());
  } else {
    checks.at(name)();
  }
  return 0;
}
