// Which instance is in which slot of the active set, and in what order they were last sampled.
//
// A hash map from instance to slot, and a doubly linked list through the slots, earliest sampled first: a
// batch costs time in proportion to itself, whatever the size of the set.

#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "philox.h"

namespace contrastive_ops {

// From non-negative keys to non-negative values: open addressing, linear probing, at most half full.
class IndexMap {
 public:
  explicit IndexMap(int64_t most)
      : entries_(std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(2 * most, 2)))),
        mask_(entries_.size() - 1),
        shift_(std::countl_zero(mask_)) {}

  // The value, or -1.
  int64_t find(int64_t key) const {
    const Entry& entry = entries_[position(key)];
    return entry.key == key ? entry.value : -1;
  }

  // The key must be absent.
  void insert(int64_t key, int64_t value) { entries_[position(key)] = {key, value}; }

  // The key must be present. Closes the gap, so that no probe ends early and none grows longer with time.
  void erase(int64_t key) {
    uint64_t gap = position(key);
    for (uint64_t i = (gap + 1) & mask_; entries_[i].key != kNone; i = (i + 1) & mask_) {
      if (((i - home(entries_[i].key)) & mask_) >= ((i - gap) & mask_)) {
        entries_[gap] = entries_[i];
        gap = i;
      }
    }
    entries_[gap].key = kNone;
  }

 private:
  static constexpr int64_t kNone = -1;
  struct Entry {
    int64_t key = kNone, value = 0;
  };

  uint64_t home(int64_t key) const { return (static_cast<uint64_t>(key) * 0x9E3779B97F4A7C15) >> shift_; }

  // Where the key is, or would be put.
  uint64_t position(int64_t key) const {
    uint64_t i = home(key);
    while (entries_[i].key != key && entries_[i].key != kNone) i = (i + 1) & mask_;
    return i;
  }

  std::vector<Entry> entries_;
  uint64_t mask_;
  int shift_;
};

// What a batch would change.
struct Plan {
  std::vector<int64_t> target;                    // (B): the slot of each index
  std::vector<int64_t> slots, incoming, evicted;  // (n): slots that change hands, to whom and from whom
  uint64_t version;                               // the state that it was made for
};

class ActiveSet {
 public:
  ActiveSet(int64_t num_instances, int64_t active, uint64_t seed)
      : num_instances_(num_instances),
        active_(active),
        slots_(checked(num_instances, active)),
        earlier_(active + 1),
        later_(active + 1),
        sampled_(active),
        version_(next_version()) {
    instances_.reserve(active);
    for (int64_t slot = 0; slot < active; ++slot) {
      // Floyd's sampling without replacement: one number each, every subset equally likely.
      const int64_t last = num_instances - active + slot;
      int64_t instance = active == num_instances ? slot : below(last + 1, slot, seed);
      if (slots_.find(instance) >= 0) instance = last;
      slots_.insert(instance, slot);
      instances_.push_back(instance);
    }
    earlier_[active] = later_[active] = active;
    for (int64_t slot = 0; slot < active; ++slot) append(slot);
  }

  int64_t num_instances() const { return num_instances_; }
  int64_t active() const { return active_; }
  int64_t protected_rows() const { return protected_; }
  const std::vector<int64_t>& instances() const { return instances_; }

  std::vector<int64_t> find(const int64_t* indices, int64_t count) const {
    check(indices, count);
    std::vector<int64_t> slots(count);
    std::transform(indices, indices + count, slots.begin(), [this](int64_t i) { return slots_.find(i); });
    return slots;
  }

  Plan plan(const int64_t* indices, int64_t count) const {
    check(indices, count);
    Plan plan{std::vector<int64_t>(count), {}, {}, {}, version_};
    IndexMap batch(count);  // slot of each of the batch's instances; of its k-th newcomer active_ + k
    int64_t wanted = protected_;
    for (int64_t i = 0; i < count; ++i) {
      int64_t slot = batch.find(indices[i]);
      if (slot < 0) {
        slot = slots_.find(indices[i]);
        if (slot < 0 || !is_protected(slot)) ++wanted;
        if (slot < 0) {
          slot = active_ + static_cast<int64_t>(plan.incoming.size());
          plan.incoming.push_back(indices[i]);
        }
        batch.insert(indices[i], slot);
      }
      plan.target[i] = slot;
    }
    if (wanted > active_) {
      throw std::invalid_argument(std::to_string(wanted) +
                                  " distinct rows would be in use since the last optimiser step, but only " +
                                  std::to_string(active_) +
                                  " fit in the active set: an optimiser step frees them, a larger active set "
                                  "holds more");
    }
    // What is protected stands last in the order, so the walk never comes to it.
    for (int64_t slot = later_[active_]; plan.slots.size() < plan.incoming.size(); slot = later_[slot]) {
      if (batch.find(instances_[slot]) >= 0) continue;
      plan.slots.push_back(slot);
      plan.evicted.push_back(instances_[slot]);
    }
    for (int64_t& slot : plan.target) {
      if (slot >= active_) slot = plan.slots[slot - active_];
    }
    return plan;
  }

  // Whether the set is as it was when the plan was made.
  bool awaits(const Plan& plan) const { return plan.version == version_; }

  // Without `protect`, the batch's rows are the last that were sampled, and yet may be evicted: in the order
  // they stand before those that may not.
  void commit(const Plan& plan, bool protect) {
    if (!awaits(plan)) {
      throw std::runtime_error("the active set has changed since this plan was made, or it is another's");
    }
    version_ = next_version();
    for (size_t k = 0; k < plan.slots.size(); ++k) {
      slots_.erase(plan.evicted[k]);
      slots_.insert(plan.incoming[k], plan.slots[k]);
      instances_[plan.slots[k]] = plan.incoming[k];
    }
    int64_t end = active_;
    for (int64_t i = 0; i < protected_ && !protect; ++i) end = earlier_[end];
    for (const int64_t slot : plan.target) {
      if (is_protected(slot) && !protect) continue;
      remove(slot);
      insert(slot, end);
      if (protect) {
        protected_ += !is_protected(slot);
        sampled_[slot] = step_;
      }
    }
  }

  void release() {
    ++step_;
    protected_ = 0;
  }

  std::vector<int64_t> order() const {
    std::vector<int64_t> slots;
    slots.reserve(active_);
    for (int64_t slot = later_[active_]; slot != active_; slot = later_[slot]) slots.push_back(slot);
    return slots;
  }

  // `instances` by slot; `order` the slots, earliest sampled first, of which the last `protected_rows` are
  // protected. Both have `active` elements.
  void load(const int64_t* instances, const int64_t* order, int64_t protected_rows) {
    IndexMap slots(active_);
    std::vector<bool> ordered(active_);
    for (int64_t i = 0; i < active_; ++i) {
      if (instances[i] < 0 || instances[i] >= num_instances_ || slots.find(instances[i]) >= 0) {
        throw std::invalid_argument("state's instances must be distinct and in [0, " +
                                    std::to_string(num_instances_) + "), got " +
                                    std::to_string(instances[i]) + " at slot " + std::to_string(i));
      }
      slots.insert(instances[i], i);
      if (order[i] < 0 || order[i] >= active_ || ordered[order[i]]) {
        throw std::invalid_argument("state's order must hold each slot once, got " +
                                    std::to_string(order[i]) + " at position " + std::to_string(i));
      }
      ordered[order[i]] = true;
    }
    if (protected_rows < 0 || protected_rows > active_) {
      throw std::invalid_argument("state's protected must be in [0, " + std::to_string(active_) + "], got " +
                                  std::to_string(protected_rows));
    }
    version_ = next_version();
    instances_.assign(instances, instances + active_);
    slots_ = std::move(slots);
    release();
    earlier_[active_] = later_[active_] = active_;
    for (int64_t i = 0; i < active_; ++i) {
      append(order[i]);
      if (i >= active_ - protected_rows) sampled_[order[i]] = step_;
    }
    protected_ = protected_rows;
  }

 private:
  static int64_t checked(int64_t num_instances, int64_t active) {
    if (active < 1 || active > num_instances) {
      throw std::invalid_argument("active must be between 1 and num_instances (" +
                                  std::to_string(num_instances) + "), got " + std::to_string(active));
    }
    return active;
  }

  // Each state of each set has a number of its own.
  static uint64_t next_version() {
    static std::atomic<uint64_t> last = 0;
    return ++last;
  }

  static int64_t below(int64_t bound, uint64_t draw, uint64_t seed) {
    const Counter words = philox({low(draw), high(draw), 0, kInitialActive}, {low(seed), high(seed)});
    const uint64_t random = uint64_t{words[1]} << 32 | words[0];
    return static_cast<int64_t>(static_cast<unsigned __int128>(random) * static_cast<uint64_t>(bound) >> 64);
  }

  void check(const int64_t* indices, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      if (indices[i] < 0 || indices[i] >= num_instances_) {
        throw std::invalid_argument("indices must be in [0, " + std::to_string(num_instances_) + "), got " +
                                    std::to_string(indices[i]) + " at position " + std::to_string(i));
      }
    }
  }

  bool is_protected(int64_t slot) const { return sampled_[slot] == step_; }

  void remove(int64_t slot) {
    later_[earlier_[slot]] = later_[slot];
    earlier_[later_[slot]] = earlier_[slot];
  }

  void insert(int64_t slot, int64_t before) {
    const int64_t last = earlier_[before];
    earlier_[slot] = last, later_[slot] = before;
    later_[last] = earlier_[before] = slot;
  }

  void append(int64_t slot) { insert(slot, active_); }

  int64_t num_instances_, active_;
  IndexMap slots_;
  std::vector<int64_t> instances_;        // (active)
  std::vector<int64_t> earlier_, later_;  // (active + 1) neighbours in the list; the last is its two ends
  std::vector<uint64_t> sampled_;         // (active) the step that each was last sampled in
  uint64_t step_ = 1;                     // counts releases
  int64_t protected_ = 0;                 // rows sampled in this step
  uint64_t version_;
};

}  // namespace contrastive_ops
