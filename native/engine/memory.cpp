// Where temporaries lie in the arena: those that live at the same time must not overlap.
#include <algorithm>

#include "engine/plan.h"

namespace pw {
namespace {

// Values that are written in the place of others, with these: one place, from the first one's life to the last one's.
std::vector<int> shared_places(Plan& plan) {
  std::vector<int> place(plan.values.size());
  for (size_t v = 0; v < place.size(); ++v) place[v] = int(v);
  for (int s = 0; s < int(plan.steps.size()); ++s) {
    const Step& step = *plan.steps[s];
    if (step.over < 0) continue;
    const int from = step.over, to = step.writes[0];
    const Value &a = plan.values[from], &b = plan.values[to];
    const auto plain = [](const Value& v, int number) {
      return v.kind == PW_TEMPORARY && v.root == number && v.halo_begin.empty() && v.dense();
    };
    const bool alike = plain(a, from) && plain(b, to) && a.dtype == b.dtype && a.allocated == b.allocated;
    if (!alike || a.last != s || b.first != s) continue;
    place[size_t(to)] = place[size_t(from)];
    plan.values[place[size_t(from)]].last = std::max(plan.values[place[size_t(from)]].last, b.last);
  }
  return place;
}

}  // namespace

void plan_memory(Plan& plan) {
  for (int s = 0; s < int(plan.steps.size()); ++s) {
    const Step& step = *plan.steps[s];
    for (const auto* list : {&step.reads, &step.writes})
      for (int v : *list) {
        if (v < 0) continue;
        Value& root = plan.values[plan.values[v].root];
        if (root.first < 0) root.first = s;
        root.last = s;
      }
    plan.scratch_bytes = std::max(plan.scratch_bytes, (step.scratch + 63) / 64 * 64);
  }
  const std::vector<int> place = shared_places(plan);
  struct Item {
    int value;
    int64_t bytes;
  };
  std::vector<Item> items;
  for (int v = 0; v < int(plan.values.size()); ++v) {
    const Value& value = plan.values[v];
    if (value.root != v || value.kind != PW_TEMPORARY || value.first < 0 || place[size_t(v)] != v) continue;
    items.push_back({v, (value.allocated * dtype_size(value.dtype) + 63) / 64 * 64});
  }
  // large ones first, each at the lowest place that is free while it lives
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.bytes > b.bytes; });
  std::vector<Item> placed;
  for (const Item& item : items) {
    Value& value = plan.values[item.value];
    std::vector<std::pair<int64_t, int64_t>> taken;
    for (const Item& other : placed) {
      const Value& o = plan.values[other.value];
      if (o.first <= value.last && value.first <= o.last) taken.push_back({o.arena, o.arena + other.bytes});
    }
    std::sort(taken.begin(), taken.end());
    int64_t at = 0;
    for (const auto& [begin, end] : taken) {
      if (at + item.bytes <= begin) break;
      at = std::max(at, end);
    }
    value.arena = at;
    plan.arena_bytes = std::max(plan.arena_bytes, at + item.bytes);
    placed.push_back(item);
  }
  for (size_t v = 0; v < place.size(); ++v) plan.values[v].arena = plan.values[place[v]].arena;
}

}  // namespace pw
