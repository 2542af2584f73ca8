// A length cut among the threads.
#pragma once

#include <algorithm>
#include <cstdint>

namespace pw {

// Every thread's part is as long as any other's, but for a grain, and lies at the same place of the length whatever
// the step; what a thread wrote in one step is then in its own cache in the next (reading it from another's takes ten
// times as long). Parts are cut into pieces that idle threads can take.
struct Pieces {
  int64_t length = 0, part = 1, piece = 1;
  int parts = 1, pieces = 1;  // pieces of a part

  int tasks() const { return parts * pieces; }
  int64_t first(int64_t task) const { return at(task / pieces, task % pieces); }
  int64_t end(int64_t task) const { return at(task / pieces, task % pieces + 1); }

 private:
  int64_t at(int64_t which, int64_t cut) const { return std::min(length, which * part + std::min(part, cut * piece)); }
};

// `parts` of multiples of `part_grain`, of at most `pieces` pieces each, of multiples of `grain`.
inline Pieces cut(int64_t length, int parts, int pieces, int64_t part_grain, int64_t grain) {
  auto up = [](int64_t n, int64_t to) { return (n + to - 1) / to * to; };
  Pieces c;
  c.length = length;
  c.part = std::max<int64_t>(1, up((length + parts - 1) / parts, part_grain));
  c.parts = int(std::max<int64_t>(1, (length + c.part - 1) / c.part));
  c.piece = std::min(c.part, std::max<int64_t>(1, up((c.part + pieces - 1) / pieces, grain)));
  c.pieces = int((c.part + c.piece - 1) / c.piece);
  return c;
}

// How many parts some work is worth, and pieces of a part.
struct Parts {
  int parts, pieces;
};

// Work of up to `least` is one thread's, who does `per_us` of it in a microsecond. What takes long is cut finer.
inline Parts parts_of(int threads, int64_t work, int64_t least, double per_us) {
  if (threads == 1 || work <= least) return {1, 1};
  const double us = double(work) / threads / per_us;
  return {threads, us > 150 ? 4 : us > 30 ? 2 : 1};
}

}  // namespace pw
