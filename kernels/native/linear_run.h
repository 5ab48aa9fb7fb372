// How one linear is cut into tasks, and the loop of a worker over its tasks.
#pragma once

#include <algorithm>
#include <type_traits>

#include "linear_epilogue.h"
#include "linear_panels.h"
#include "linear_tiles.h"

namespace pio {

// A task is a block of rows with a few neighbouring panels. Its panels are cut along k: 32 KB of a
// panel stay in the first cache while all rows of the block go past them, and the same steps of
// these rows stay in the second cache for the task's other panels.
struct Blocking {
  int64_t rows;
  int64_t panels;
  int64_t steps;

  static constexpr int64_t kPanels = 4;
  static constexpr int64_t kSteps = 128;
  // So many tasks a worker let all workers end at nearly the same time.
  static constexpr int64_t kTasksPerWorker = 4;

  // `few_rows_steps`: the longest chunk that the weight gives where each is used once.
  Blocking(int64_t num_rows, const PanelShape& shape, int64_t num_workers, int64_t tile_rows,
           int64_t block_rows, int64_t few_rows_steps)
      : rows(std::min(num_rows, block_rows)),
        panels(1),
        steps(std::min(shape.steps, few_rows_steps)) {
    if (num_rows <= tile_rows) return;  // each weight is used once
    const int64_t tasks = shape.num_panels * ceil_div(num_rows, rows);
    panels = std::clamp<int64_t>(tasks / (num_workers * kTasksPerWorker), 1, kPanels);
    steps = std::min(shape.steps, kSteps);
  }
};

// `Weight` is `Panels` or what gives chunks of the same layout.
template <class T, class Weight>
class LinearRun {
 public:
  LinearRun(Worker& worker, const Weight& weight, View<const T> x)
      : worker_(worker),
        weight_(weight),
        x_(x),
        blocking_(x.rows, weight.shape, worker.count, Tiles<T>::kRows, Tiles<T>::kBlockRows,
                  Weight::kFewRowsSteps),
        groups_(ceil_div(weight.shape.num_panels, blocking_.panels)),
        num_tasks_(x.rows == 0 ? 0 : groups_ * ceil_div(x.rows, blocking_.rows)) {}

  template <class Output>
  void operator()(const Output& to) {
    for (int64_t number = worker_.take(); number < num_tasks_; number = worker_.take()) {
      const Task task = task_at(number);
      if (task.first_row != prepared_row_) prepare(task);
      for (int64_t step = 0; step < weight_.shape.steps; step += blocking_.steps) {
        multiply_chunk(task, step, to);
      }
    }
  }

 private:
  struct Task {
    int64_t first_row, rows, first_panel, panels;
  };

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
    const bool is_first = step == 0, is_last = step + steps == weight_.shape.steps;
    const bool keeps = !(is_first && is_last);
    float* sums = scratch(keeps ? task.rows * task.panels : Tiles<T>::kRows);
    for (int64_t i = 0; i < task.panels; ++i) {
      const int64_t panel = task.first_panel + i;
      const std::byte* weights = weight_.steps_at(panel, step, steps);
      for (int64_t row = 0; row < task.rows; row += Tiles<T>::kRows) {
        const int64_t rows = std::min(Tiles<T>::kRows, task.rows - row);
        float* out = keeps ? sums + (i * task.rows + row) * kPanelColumns : sums;
        // The first tile fetches the weights from memory, the others find them in the cache.
        const Prefetch ahead = row == 0 ? stream(panel, step, steps) : Prefetch{};
        tiles_.multiply(row, rows, weights, step, steps, !is_first, out, ahead);
        if (is_last) finish_tile(task.first_row + row, rows, panel, out, to);
      }
    }
  }

  // Behind the end of a chunk lies the panel's next one; only the last steps of all have none.
  Prefetch stream(int64_t panel, int64_t step, int64_t steps) const {
    if constexpr (std::is_same_v<Weight, Panels>) {
      const int64_t begin = step + Tiles<T>::kStreamSteps;
      return {weight_.at(panel, begin), std::clamp<int64_t>(weight_.shape.steps - begin, 0, steps)};
    } else {
      return weight_.ahead(panel, step, steps);
    }
  }

  template <class Output>
  void finish_tile(int64_t first_row, int64_t rows, int64_t panel, float* sums, const Output& to) {
    const PanelShape& shape = weight_.shape;
    for (int64_t r = 0; r < rows; ++r) {
      float* product = sums + r * kPanelColumns;
      apply(weight_.terms, panel, product);
      finish(to, first_row + r, panel * shape.panel_columns, shape.columns_of(panel), product);
    }
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
