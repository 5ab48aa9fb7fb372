// How one linear is cut into tasks, and the loop of a worker over its tasks.
#pragma once

#include <algorithm>

#include "linear_epilogue.h"
#include "linear_fetch.h"
#include "linear_panels.h"
#include "linear_tiles.h"

namespace pio {

// A task is a block of rows with a few neighbouring panels. Its panels are cut along k: 32 KB of a
// panel, or of a strip, stay in the first cache while all rows of the block go past them, and the
// same steps of these rows stay in the second cache for the task's other panels.
struct Blocking {
  int64_t rows;
  int64_t panels;
  int64_t together;  // panels whose sums wait for each other; with few rows each is read to its end
  int64_t steps;

  static constexpr int64_t kPanels = 4;
  // So many tasks a worker let all workers end at nearly the same time.
  static constexpr int64_t kTasksPerWorker = 2;
  static constexpr int64_t kReadsPerWorker = 8;

  // `few_rows_steps`: the longest chunk that the weight gives where each is used once.
  template <class Tiles>
  static Blocking of(int64_t num_rows, const PanelShape& shape, int64_t num_workers,
                     int64_t few_rows_steps) {
    if (num_rows <= Tiles::kRows) {  // each weight is used once
      const int64_t panels = shape.num_panels / (num_workers * kReadsPerWorker);
      return {num_rows, std::clamp<int64_t>(panels, 1, kPanels), 1,
              std::min(shape.steps, few_rows_steps)};
    }
    // Blocks of nearly one size, of whole tiles.
    const int64_t blocks = ceil_div(num_rows, Tiles::kBlockRows);
    const int64_t rows = ceil_div(ceil_div(num_rows, blocks), Tiles::kRows) * Tiles::kRows;
    const int64_t share = shape.num_panels * blocks / (num_workers * kTasksPerWorker);
    const int64_t panels = std::clamp<int64_t>(share, 1, kPanels);
    return {rows, panels, panels, std::min(shape.steps, Tiles::kChunkSteps)};
  }
};

// The tiles that multiply rows of T with chunks of `Weight`.
template <class T, class Weight>
struct TilesOf {
  using Type = Tiles<T>;
};

// `Weight` is `Panels` or what gives chunks of the same layout.
template <class T, class Weight>
class LinearRun {
  template <class E>
  using Tiles = typename TilesOf<E, Weight>::Type;

 public:
  LinearRun(Worker& worker, const Weight& weight, View<const T> x)
      : worker_(worker),
        weight_(weight),
        x_(x),
        blocking_(Blocking::of<Tiles<T>>(x.rows, weight.shape, worker.count, Weight::kFewRowsSteps)),
        groups_(ceil_div(weight.shape.num_panels, blocking_.panels)),
        num_tasks_(x.rows == 0 ? 0 : groups_ * ceil_div(x.rows, blocking_.rows)) {}

  template <class Output>
  void operator()(const Output& to) {
    for (int64_t number = worker_.take(); number < num_tasks_; number = worker_.take()) {
      const Task task = task_at(number);
      if (task.first_row != prepared_row_) prepare(task);
      for (int64_t i = 0; i < task.panels; i += blocking_.together) {
        multiply(task.part(i, blocking_.together), to);
      }
    }
  }

 private:
  struct Task {
    int64_t first_row, rows, first_panel, panels;

    Task part(int64_t first, int64_t count) const {
      return {first_row, rows, first_panel + first, std::min(count, panels - first)};
    }
  };

  template <class Output>
  void multiply(const Task& task, const Output& to) {
    for (int64_t step = 0; step < weight_.shape.steps; step += blocking_.steps) {
      multiply_chunk(task, step, to);
    }
  }

  Task task_at(int64_t number) const {
    const int64_t row = number / groups_ * blocking_.rows;
    const int64_t panel = number % groups_ * blocking_.panels;
    return {row, std::min(blocking_.rows, x_.rows - row), panel,
            std::min(blocking_.panels, weight_.shape.num_panels - panel)};
  }

  void prepare(const Task& task) {
    tiles_.prepare({x_.row(task.first_row), task.rows, x_.cols, x_.stride}, weight_.shape.steps);
    prepared_row_ = task.first_row;
  }

  // Steps of all the task's panels with all its rows. Sums wait in memory for the next chunk.
  template <class Output>
  void multiply_chunk(const Task& task, int64_t step, const Output& to) {
    const int64_t steps = std::min(blocking_.steps, weight_.shape.steps - step);
    const bool keeps = steps < weight_.shape.steps || by_strips(task);
    float* sums = scratch(keeps ? task.rows * task.panels : Tiles<T>::kRows);
    for (int64_t i = 0; i < task.panels; ++i) {
      const Piece piece{task.first_panel + i, step, steps, step + steps == weight_.shape.steps};
      float* out = keeps ? sums + i * task.rows * kPanelColumns : sums;
      if (by_strips(task)) {
        multiply_strips(task, piece, out, to);
      } else {
        multiply_panel(task, piece, out, keeps, to);
      }
    }
  }

  // Steps of a panel.
  struct Piece {
    int64_t panel, step, steps;
    bool is_last;
  };

  // `sums` has all rows of the task where it `keeps` them, else those of one tile.
  template <class Output>
  void multiply_panel(const Task& task, const Piece& piece, float* sums, bool keeps,
                      const Output& to) {
    const Chunk weights = weight_.steps_at(piece.panel, piece.step, piece.steps);
    for (int64_t row = 0; row < task.rows; row += Tiles<T>::kRows) {
      const int64_t rows = std::min(Tiles<T>::kRows, task.rows - row);
      float* out = keeps ? sums + row * kPanelColumns : sums;
      // The first tile fetches the weights from memory, the others find them in the cache.
      const Prefetch ahead = row == 0 ? stream(piece) : Prefetch{};
      tiles_.multiply(row, rows, weights, piece.step, piece.steps, piece.step != 0, out, ahead);
      for (int64_t r = 0; piece.is_last && r < rows; ++r) {
        finish_row(task.first_row + row + r, piece.panel, {out + r * kPanelColumns, kStripColumns},
                   to);
      }
    }
  }

  template <class Output>
  void multiply_strips(const Task& task, const Piece& piece, float* sums, const Output& to) {
    if constexpr (Tiles<T>::kByStrips) {
      const Chunk weights = weight_.steps_at(piece.panel, piece.step, piece.steps);
      const Piece behind = next(task, piece);
      const int64_t tiles = ceil_div(task.rows, Tiles<T>::kRows);
      const int64_t tile_steps = piece.steps / Tiles<T>::kStepGranule;
      for (int64_t strip = 0; strip < kStrips; ++strip) {
        const bool finishes = piece.is_last && strip == kStrips - 1;
        const Span stored = weight_.stored(behind.panel, strip, behind.step, behind.steps);
        const int64_t share = ceil_div(stored.num_bytes, tiles * kLineBytes) * kLineBytes;
        int64_t finished = 0;
        for (int64_t row = 0; row < task.rows; row += Tiles<T>::kRows) {
          const int64_t rows = std::min(Tiles<T>::kRows, task.rows - row);
          float* out = sums + (strip * task.rows + row) * kStripColumns;
          const Span ahead{stored.data + row / Tiles<T>::kRows * share, share};
          const auto multiply = [&](auto other) {
            tiles_.multiply_strip(row, rows, weights.at(strip * kStripColumns), piece.step,
                                  piece.steps, piece.step != 0, out,
                                  BlockFetch(ahead, tile_steps, other));
          };
          if (!finishes) {
            multiply([] {});
            continue;
          }
          // Rows of the tile before.
          multiply([&, count = ceil_div(Tiles<T>::kRows, tile_steps)] {
            for (int64_t end = std::min(finished + count, row); finished < end; ++finished) {
              finish_strips(task, finished, piece.panel, sums, to);
            }
          });
        }
        if (!finishes) continue;
        for (; finished < task.rows; ++finished) {
          finish_strips(task, finished, piece.panel, sums, to);
        }
      }
    }
  }

  template <class Output>
  void finish_strips(const Task& task, int64_t row, int64_t panel, float* sums, const Output& to) {
    finish_row(task.first_row + row, panel,
               {sums + row * kStripColumns, task.rows * kStripColumns}, to);
  }

  bool by_strips(const Task& task) const {
    return Tiles<T>::kByStrips && task.rows > Tiles<T>::kRows;
  }

  // The piece behind this one: of the next panel, or of the next steps, or of the task that this
  // worker may take next.
  Piece next(const Task& task, const Piece& piece) const {
    const int64_t all = weight_.shape.steps;
    int64_t panel = piece.panel + 1, step = piece.step;
    if (panel == task.first_panel + task.panels) {
      panel = task.first_panel;
      step += piece.steps;
    }
    if (step == all) {
      panel = (panel + worker_.count * blocking_.panels) % weight_.shape.num_panels;
      step = 0;
    }
    const int64_t steps = std::min(blocking_.steps, all - step);
    return {panel, step, steps, step + steps == all};
  }

  Prefetch stream(const Piece& piece) const {
    return weight_.ahead(piece.panel, piece.step, piece.steps, Tiles<T>::kStreamSteps);
  }

  template <class Output>
  void finish_row(int64_t row, int64_t panel, const Product& product, const Output& to) {
    const PanelShape& shape = weight_.shape;
    apply(weight_.terms, panel, product);
    finish(to, row, panel * shape.panel_columns, shape.columns_of(panel), product);
  }

  static float* scratch(int64_t rows) {
    thread_local KeptBuffer<float> kept;
    return kept.get(rows * kPanelColumns);
  }

  Worker& worker_;
  const Weight& weight_;
  const View<const T> x_;
  const Blocking blocking_;
  const int64_t groups_;
  const int64_t num_tasks_;
  Tiles<T> tiles_;
  int64_t prepared_row_ = -1;
};

}  // namespace pio
