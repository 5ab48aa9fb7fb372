// Threads that are kept for the life of the process and compute one region after the other.
//
// A kernel is a function that every worker of a region calls with the same arguments; the workers
// split it among themselves, by index or by taking numbers from the region's shared counter. Kernels
// end without waiting for each other: whoever reads what a kernel wrote calls `barrier` before.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace pio {

class Team;

class Worker {
 public:
  Worker(Team& team, int index, int count) : index(index), count(count), team_(team) {}

  const int index;  // of this worker, the calling thread is 0
  const int count;  // workers in the region

  // Waits for the others; what they wrote before is seen after. Resets the shared counter.
  void barrier();

  // Memory that all workers of the team share, at least so many bytes, until the next call. All of
  // them call it with the same size.
  std::byte* shared(size_t num_bytes);

  // The next number 0, 1, 2, ... that no other worker has taken since the last barrier.
  int64_t take();

 private:
  Team& team_;
};

class Team {
 public:
  // The process's team of this size; its threads start with the first region. Never destroyed:
  // threads that sleep when the process ends have nothing to run into.
  static Team& of(int num_threads);

  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const;

  // Runs `body` on every worker and returns when all are done; the caller is worker 0. Callers
  // take turns. `body` throws nothing and starts no region.
  void run(const std::function<void(Worker&)>& body);

 private:
  friend class Worker;
  struct State;

  explicit Team(int num_threads);
  static void renew_after_fork();

  State* state_;
};

}  // namespace pio
