// Tensors of equal sizes walked row by row: the longest run that is contiguous in all of them, and where each run lies.
#pragma once

#include <algorithm>
#include <vector>

#include "engine/plan.h"

namespace pw {

struct Rows {
  int64_t length = 1;                         // elements of a run
  int64_t count = 1;                          // runs
  std::vector<std::vector<int64_t>> offsets;  // per tensor, per run; empty where runs follow each other

  int64_t at(int tensor, int64_t row) const { return offsets[tensor].empty() ? row * length : offsets[tensor][row]; }
};

// Strides of a tensor that is broadcast to `dims`.
inline std::vector<int64_t> broadcast_strides(const Value& v, const std::vector<int64_t>& dims) {
  std::vector<int64_t> s(dims.size(), 0);
  const size_t shift = dims.size() - v.dims.size();
  for (size_t i = 0; i < v.dims.size(); ++i) s[shift + i] = v.dims[i] == 1 ? 0 : v.strides[i];
  // an axis of size 1 in the result may have any stride
  for (size_t i = 0; i < dims.size(); ++i)
    if (dims[i] == 1) s[i] = i + 1 < dims.size() ? s[i + 1] * dims[i + 1] : 1;
  return s;
}

// strides: per tensor, per axis (0 where a tensor is broadcast). Runs of a tensor whose last stride is 0 keep step 0.
inline Rows rows_of(const std::vector<int64_t>& dims, const std::vector<std::vector<int64_t>>& strides) {
  Rows rows;
  int axis = int(dims.size()) - 1;
  for (; axis >= 0; --axis) {
    bool joins = true;
    for (const auto& s : strides) {
      const bool flat = dims[axis] == 1 || s[axis] == rows.length;
      joins = joins && flat;
    }
    if (!joins && !(axis == int(dims.size()) - 1)) break;
    rows.length *= dims[axis];
    if (!joins) {  // the last axis is a run whatever its strides (0 or 1)
      --axis;
      break;
    }
  }
  for (int i = 0; i <= axis; ++i) rows.count *= dims[i];
  rows.offsets.resize(strides.size());
  for (size_t t = 0; t < strides.size(); ++t) {
    bool following = true;
    int64_t expected = rows.length;
    for (int i = axis; i >= 0; --i) {
      if (dims[i] != 1 && strides[t][i] != expected) following = false;
      expected *= dims[i];
    }
    if (following && axis >= 0 && rows.count > 0 && !(strides[t].back() == 0 && dims.back() != 1)) continue;
    if (rows.count <= 1) {
      rows.offsets[t].assign(size_t(std::max<int64_t>(rows.count, 1)), 0);
      continue;
    }
    rows.offsets[t].resize(size_t(rows.count));
    std::vector<int64_t> index(size_t(axis + 1), 0);
    int64_t at = 0;
    for (int64_t r = 0; r < rows.count; ++r) {
      rows.offsets[t][size_t(r)] = at;
      for (int i = axis; i >= 0; --i) {
        at += strides[t][i];
        if (++index[i] < dims[i]) break;
        at -= strides[t][i] * dims[i];
        index[i] = 0;
      }
    }
  }
  return rows;
}

// How to share `rows` among tasks: pieces of whole rows, or pieces of the only row.
struct Share {
  int tasks = 1;
  bool by_row = true;
};

inline Share share_rows(const Rows& rows, int threads, int64_t cost_per_element) {
  const int64_t work = rows.length * rows.count * cost_per_element;  // in fractions of a nanosecond, roughly
  const int64_t most = std::max<int64_t>(1, work / 20000);
  Share s;
  s.by_row = rows.count >= threads * 2 || rows.length < 4096;
  s.tasks = int(std::min<int64_t>({most, int64_t(threads) * 2, s.by_row ? rows.count : rows.length / 1024}));
  s.tasks = threads == 1 ? 1 : std::max(1, s.tasks);
  return s;
}

// Calls body(row, first, length) for the part of a task.
template <class F>
void for_rows(const Rows& rows, const Share& share, int task, F body) {
  if (share.tasks == 1) {
    for (int64_t r = 0; r < rows.count; ++r) body(r, int64_t(0), rows.length);
  } else if (share.by_row) {
    const int64_t from = rows.count * task / share.tasks, to = rows.count * (task + 1) / share.tasks;
    for (int64_t r = from; r < to; ++r) body(r, int64_t(0), rows.length);
  } else {
    const int64_t piece = (rows.length / share.tasks + 63) / 64 * 64;
    const int64_t from = std::min(rows.length, piece * task);
    const int64_t to = task + 1 == share.tasks ? rows.length : std::min(rows.length, piece * (task + 1));
    for (int64_t r = 0; r < rows.count && from < to; ++r) body(r, from, to - from);
  }
}

}  // namespace pw
