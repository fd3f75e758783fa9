// Barriers, what the lanes of a warp do together, asynchronous copies.
#include <algorithm>
#include <cstdlib>

#include "block.h"

namespace simt {
namespace {

// Mutations of the kernels that were compiled: SIMT_DELETE=file:line drops the barrier there,
// SIMT_NARROW=file:line takes the upper half out of the mask there. A file is its last path component.
bool is_mutated(const char* variable, Site site) {
  static const std::map<std::string, std::string> targets = [] {
    std::map<std::string, std::string> t;
    for (const char* name : {"SIMT_DELETE", "SIMT_NARROW"})
      if (const char* text = std::getenv(name)) t[name] = text;
    return t;
  }();
  const auto target = targets.find(variable);
  if (target == targets.end()) return false;
  const std::string whole(site);
  const std::string& end = target->second;
  return whole.size() > end.size() &&
         whole.compare(whole.size() - end.size(), end.size(), end) == 0 &&
         whole[whole.size() - end.size() - 1] == '/';
}

}  // namespace

int barrier(Site site, BarrierOp op, bool predicate) {
  if (op == BarrierOp::plain && is_mutated("SIMT_DELETE", site)) return 0;
  Thread& t = me();
  t.site = site;
  t.barrier_op = op;
  t.predicate = predicate;
  t.state = State::at_barrier;
  running->yield();
  return running->barrier_result;
}

uint64_t warp_op(Site site, WarpOp op, uint32_t mask, uint64_t value, int argument, int width) {
  if (op == WarpOp::sync && is_mutated("SIMT_DELETE", site)) return 0;
  if (is_mutated("SIMT_NARROW", site)) mask &= 0xffff;
  Thread& t = me();
  const int lane = t.linear % kWarp, first = t.linear - lane;
  const int lanes = std::min(kWarp, int(running->threads.size()) - first);
  if ((mask >> lane & 1) == 0) fail(site, "a lane calls a warp operation whose mask leaves it out");
  if (lanes < kWarp && mask >> lanes != 0)
    fail(site, "the mask names lanes that the block has not");
  if (width < 1 || width > kWarp || (width & (width - 1)) != 0)
    fail(site, "the width of a shuffle is a power of two up to 32");
  t.site = site;
  t.op = op;
  t.mask = mask;
  t.value = value;
  t.argument = argument;
  t.width = width;
  t.state = State::at_warp_op;
  Thread* const warp = &running->threads[first];
  for (int i = 0; i < lanes; ++i) {
    if ((mask >> i & 1) == 0) continue;
    const Thread& other = warp[i];
    if (other.state == State::at_warp_op && other.site == site && other.mask != mask)
      fail(site, "lanes of one warp operation name different masks");
    if (other.state != State::at_warp_op || other.site != site) {
      running->yield();
      return t.result;
    }
  }
  // This lane is the last: it does the work of all.
  if (op == WarpOp::collective) {
    void* operands[kWarp];
    for (int i = 0; i < kWarp; ++i) operands[i] = warp[i].operand;
    reinterpret_cast<Collective>(value)(operands);
  }
  for (int i = 0; i < lanes; ++i) {
    if ((mask >> i & 1) == 0) continue;
    Thread& to = warp[i];
    const int segment = i & ~(to.width - 1);
    int from = i;
    switch (op) {
      case WarpOp::sync:
        ++to.warp_epoch;
        break;
      case WarpOp::collective:
        break;
      case WarpOp::ballot:
        to.result = 0;
        for (int j = 0; j < lanes; ++j)
          if ((mask >> j & 1) != 0 && warp[j].value != 0) to.result |= uint64_t(1) << j;
        break;
      case WarpOp::match_any:
        to.result = 0;
        for (int j = 0; j < lanes; ++j)
          if ((mask >> j & 1) != 0 && warp[j].value == to.value) to.result |= uint64_t(1) << j;
        break;
      case WarpOp::shuffle:
        from = segment + (to.argument & (to.width - 1));
        break;
      case WarpOp::shuffle_up:
        from = i - to.argument < segment ? i : i - to.argument;
        break;
      case WarpOp::shuffle_down:
        from = i + to.argument >= segment + to.width ? i : i + to.argument;
        break;
      case WarpOp::shuffle_xor:
        from = (i ^ to.argument) >= segment + to.width ? i : i ^ to.argument;
        break;
    }
    const bool moves = op == WarpOp::shuffle || op == WarpOp::shuffle_up ||
                       op == WarpOp::shuffle_down || op == WarpOp::shuffle_xor;
    if (moves && (from >= lanes || (mask >> from & 1) == 0))
      fail(site, "lane " + std::to_string(i) + " takes a value from lane " + std::to_string(from) +
                     ", which its mask leaves out");
    if (moves) to.result = warp[from].value;
  }
  for (int i = 0; i < lanes; ++i)
    if ((mask >> i & 1) != 0) warp[i].state = State::ready;
  return t.result;
}

void collective(Site site, void* operand, Collective work) {
  me().operand = operand;
  warp_op(site, WarpOp::collective, 0xffffffffu, reinterpret_cast<uint64_t>(work), 0, kWarp);
}

void copy_async(std::function<void()> copy) {
  if (me().copies.empty()) me().copies.emplace_back();
  me().copies.back().push_back(std::move(copy));
}
void copy_async_commit() { me().copies.emplace_back(); }
void copy_async_wait(int pending) {
  auto& groups = me().copies;
  while (int(groups.size()) > pending + 1) {  // the open group is not waited for
    for (const auto& copy : groups.front()) copy();
    groups.erase(groups.begin());
  }
}

}  // namespace simt
