// How one linear is cut into tasks, and the loop of a worker over its tasks.
#pragma once

#include <algorithm>

#include "linear_epilogue.h"
#include "linear_panels.h"
#include "linear_tiles.h"

namespace pio {

// A task is a block of rows with a few neighbouring panels. Its panels are cut along k, so that
// what a worker reads again and again stays in its second cache beside what it reads ahead.
struct Blocking {
  int64_t rows;
  int64_t panels;
  int64_t steps;
  int64_t tile_rows;

  // 128 KB of a panel.
  static constexpr int64_t kSteps = 512;
  // Rows of x are read from the third cache once for so many panels.
  static constexpr int64_t kPanels = 4;
  // So many tasks a worker let all workers end at nearly the same time.
  static constexpr int64_t kTasksPerWorker = 4;

  Blocking(int64_t num_rows, int64_t num_panels, int64_t num_workers, int64_t tile, int64_t block)
      : rows(std::min(num_rows, block)), panels(1), steps(kSteps) {
    // Tiles of about equal height: no nearly empty one at the end.
    tile_rows = tile;
    if (num_rows > tile) {
      const int64_t tasks = num_panels * ceil_div(num_rows, rows);
      panels = std::clamp<int64_t>(tasks / (num_workers * kTasksPerWorker), 1, kPanels);
    }
  }
};

template <class T>
class LinearRun {
 public:
  LinearRun(Worker& worker, const Panels& weight, View<const T> x)
      : worker_(worker),
        weight_(weight),
        x_(x),
        blocking_(x.rows, weight.shape.num_panels, worker.count, Tiles<T>::kRows,
                  Tiles<T>::kBlockRows),
        groups_(ceil_div(weight.shape.num_panels, blocking_.panels)),
        num_tasks_(x.rows == 0 ? 0 : groups_ * ceil_div(x.rows, blocking_.rows)) {}

  template <class Output>
  void operator()(const Output& to) {
    for (int64_t number = worker_.take(); number < num_tasks_;) {
      // Known before this one is computed, so that its weights are read ahead.
      const int64_t following = worker_.take();
      const Task task = task_at(number);
      if (task.first_row != prepared_row_) prepare(task);
      for (int64_t step = 0; step < weight_.shape.steps; step += blocking_.steps) {
        multiply_chunk(task, step, following, to);
      }
      number = following;
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

  bool is_whole(int64_t step) const { return step + blocking_.steps >= weight_.shape.steps; }

  // Steps of all the task's panels with all its rows. Sums wait in memory for the next chunk.
  template <class Output>
  void multiply_chunk(const Task& task, int64_t step, int64_t following, const Output& to) {
    const int64_t steps = std::min(blocking_.steps, weight_.shape.steps - step);
    const bool is_last = is_whole(step);
    const bool keeps = step > 0 || !is_last;
    const int64_t num_tiles = ceil_div(task.rows, blocking_.tile_rows);
    float* sums = scratch(keeps ? task.rows * task.panels : blocking_.tile_rows);
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const int64_t row = tile * blocking_.tile_rows;
      const int64_t rows = std::min(blocking_.tile_rows, task.rows - row);
      for (int64_t i = 0; i < task.panels; ++i) {
        const int64_t panel = task.first_panel + i;
        float* out = keeps ? sums + (i * task.rows + row) * kPanelColumns : sums;
        const Prefetch ahead = is_last ? share(begin_of(following, i), tile, num_tiles, steps)
                                       : share({panel, step + steps}, tile, num_tiles, steps);
        tiles_.multiply(row, rows, weight_.at(panel, step), step, steps, step > 0, out, ahead);
        if (is_last) finish_tile(task.first_row + row, rows, panel, out, to);
      }
    }
  }

  struct Place {
    int64_t panel, step;
  };

  Place begin_of(int64_t number, int64_t panel) const {
    if (number >= num_tasks_) return {-1, 0};
    const Task task = task_at(number);
    return panel < task.panels ? Place{task.first_panel + panel, 0} : Place{-1, 0};
  }

  // What tile `tile` of `num_tiles` reads ahead of the chunk that begins at `place`.
  Prefetch share(Place place, int64_t tile, int64_t num_tiles, int64_t steps_of_tile) const {
    if (place.panel < 0) return {};
    const int64_t steps = std::min(blocking_.steps, weight_.shape.steps - place.step);
    const int64_t begin = steps * tile / num_tiles, end = steps * (tile + 1) / num_tiles;
    return {weight_.at(place.panel, place.step + begin), std::min(end - begin, steps_of_tile)};
  }

  template <class Output>
  void finish_tile(int64_t first_row, int64_t rows, int64_t panel, float* sums, const Output& to) {
    const PanelShape& shape = weight_.shape;
    for (int64_t r = 0; r < rows; ++r) {
      float* product = sums + r * kPanelColumns;
      if (!weight_.bias.empty()) add_bias(weight_.bias.data() + panel * kPanelColumns, product);
      finish(to, first_row + r, panel * shape.panel_columns, shape.columns_of(panel), product);
    }
  }

  static void add_bias(const float* bias, float* product) {
    for (int64_t i = 0; i < kPanelColumns; i += simd::kLanes) {
      simd::store(product + i, simd::load(product + i) + simd::load(bias + i));
    }
  }

  static float* scratch(int64_t rows) {
    thread_local KeptBuffer<float> kept;
    return kept.get(rows * kPanelColumns);
  }

  Worker& worker_;
  const Panels& weight_;
  const View<const T> x_;
  const Blocking blocking_;
  const int64_t groups_;
  const int64_t num_tasks_;
  Tiles<T> tiles_;
  int64_t prepared_row_ = -1;
};

}  // namespace pio
