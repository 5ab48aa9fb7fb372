#include "team.h"

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <atomic>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "huge_buffer.h"

namespace pio {

namespace {

// A pause lasts 15 to 50 ns. A barrier is reached within tens of microseconds by workers that all
// run; between the regions of one step (per-layer calls) the caller spends as much.
constexpr int kSpins = 2000;
// Then another thread wants this CPU, maybe the one that is waited for.
constexpr int kYields = 32;
constexpr int kCacheLine = 64;

void wait_while(const std::atomic<uint32_t>& word, uint32_t value) {
  for (int i = 0; i < kSpins; ++i) {
    if (word.load(std::memory_order_acquire) != value) return;
    _mm_pause();
  }
  for (int i = 0; i < kYields; ++i) {
    if (word.load(std::memory_order_acquire) != value) return;
    sched_yield();
  }
  word.wait(value, std::memory_order_acquire);
}

// The store is sequentially consistent: it comes before the look at whether anyone sleeps.
void advance(std::atomic<uint32_t>& word, uint32_t value) {
  word.store(value);
  word.notify_all();
}

std::mutex& registry_mutex() {
  static auto* mutex = new std::mutex;
  return *mutex;
}

std::map<int, Team*>& registry() {
  static auto* teams = new std::map<int, Team*>;
  return *teams;
}

thread_local bool inside_region = false;

}  // namespace

// The CPUs that this process may use.
std::vector<int> usable_cpus() {
  cpu_set_t set;
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return cpus;  // more CPUs than the set has room for
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  }
  return cpus;
}

void pin(std::thread& thread, int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(thread.native_handle(), sizeof set, &set);  // a wish: it runs elsewhere too
}

// Each word that many workers write has a cache line of its own.
struct Team::State {
  explicit State(int size) : size(size) {}

  const int size;
  std::mutex turn;
  bool started = false;
  const std::function<void(Worker&)>* body = nullptr;
  HugeBuffer shared;
  size_t shared_bytes = 0;
  alignas(kCacheLine) std::atomic<uint32_t> region{0};
  alignas(kCacheLine) std::atomic<uint32_t> generation{0};
  alignas(kCacheLine) std::atomic<int> arrived{0};
  alignas(kCacheLine) std::atomic<int64_t> next{0};

  void start(Team& team);
  void serve(Team& team, int index);
};

void Worker::barrier() {
  Team::State& state = *team_.state_;
  // It cannot change before this worker has arrived.
  const uint32_t generation = state.generation.load(std::memory_order_relaxed);
  if (state.arrived.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
    state.arrived.store(0, std::memory_order_relaxed);
    state.next.store(0, std::memory_order_relaxed);
    advance(state.generation, generation + 1);
  } else {
    wait_while(state.generation, generation);
  }
}

std::byte* Worker::shared(size_t num_bytes) {
  Team::State& state = *team_.state_;
  if (state.shared_bytes < num_bytes) {
    barrier();  // all have seen that it is too small
    if (index == 0) {
      state.shared = HugeBuffer::whole_pages(num_bytes);
      state.shared_bytes = num_bytes;
    }
    barrier();
  }
  return state.shared.data();
}

int64_t Worker::take() { return team_.state_->next.fetch_add(1, std::memory_order_relaxed); }

// Signals are for the threads of the interpreter.
void Team::State::start(Team& team) {
  // With a thread for every CPU each has its own. A smaller team leaves the choice to the system:
  // which CPUs other processes have taken is not known here. Worker 0 is the caller's thread, whose
  // own threads would inherit its place.
  const std::vector<int> cpus = usable_cpus();
  const bool has_all_cpus = size == static_cast<int>(cpus.size());
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    for (int index = 1; index < size; ++index) {
      std::thread thread([this, &team, index] { serve(team, index); });
      const std::string name = "pio-kernel-" + std::to_string(index);
      pthread_setname_np(thread.native_handle(), name.substr(0, 15).c_str());
      if (has_all_cpus) pin(thread, cpus[static_cast<size_t>(index)]);
      thread.detach();
    }
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  started = true;
}

void Team::State::serve(Team& team, int index) {
  inside_region = true;
  for (uint32_t seen = 0;; ++seen) {
    wait_while(region, seen);
    Worker worker(team, index, size);
    (*body)(worker);
    worker.barrier();
  }
}

Team::Team(int num_threads) : state_(new State(num_threads)) {}

Team& Team::of(int num_threads) {
  if (num_threads < 1) {
    throw std::invalid_argument("a team has at least one thread, not " +
                                std::to_string(num_threads));
  }
  const std::lock_guard lock(registry_mutex());
  if (registry().empty()) pthread_atfork(nullptr, nullptr, renew_after_fork);
  Team*& team = registry()[num_threads];
  if (team == nullptr) team = new Team(num_threads);
  return *team;
}

// A forked child has none of its parent's threads, and maybe their locks.
void Team::renew_after_fork() {
  for (auto& [size, team] : registry()) team->state_ = new State(size);
}

int Team::size() const { return state_->size; }

void Team::run(const std::function<void(Worker&)>& body) {
  if (inside_region) throw std::logic_error("a region was started within a region");
  State& state = *state_;
  const std::lock_guard turn(state.turn);
  if (!state.started) state.start(*this);
  state.body = &body;
  inside_region = true;
  if (state.size > 1) advance(state.region, state.region.load(std::memory_order_relaxed) + 1);
  Worker worker(*this, 0, state.size);
  body(worker);
  worker.barrier();
  inside_region = false;
}

}  // namespace pio
