// Shared memory that is watched: bounds, reads of nothing, races.
#include "block.h"

namespace simt {

SharedArray::SharedArray(Site site, size_t bytes, size_t element, std::string name)
    : site_(site),
      name_(std::move(name)),
      bytes_(element),
      data_(bytes),
      elements_(bytes / element) {
  poison(data_.data(), data_.size());
}

SharedArray::Element& SharedArray::at(size_t index, const char* what) {
  if (index >= elements_.size())
    fail(site_, std::string(what) + " beyond shared array " + name_ + ": index " +
                    std::to_string(int64_t(index)) + " of " + std::to_string(elements_.size()));
  return elements_[index];
}

namespace {
bool unordered(const Access& before, const Access& now) {
  if (before.thread < 0 || before.thread == now.thread || before.block_epoch != now.block_epoch)
    return false;
  return before.thread / kWarp != now.thread / kWarp || before.warp_epoch == now.warp_epoch;
}
Access my_access() { return {me().linear, running->epoch, me().warp_epoch}; }
}  // namespace

void SharedArray::check(const Element& element, size_t index, const Access& now, bool writes,
                        bool atomic) const {
  const auto race = [&](const Access& before, const char* did) {
    if (!unordered(before, now)) return;
    fail(site_, "race on shared array " + name_ + "[" + std::to_string(index) + "]: thread " +
                    std::to_string(before.thread) + " " + did + " it, this thread " +
                    (writes ? "writes" : "reads") + " it, and no barrier orders the two");
  };
  race(element.writer, "wrote");
  if (!atomic) race(element.atomic, "updated");
  if (!writes) return;
  race(element.reader, "read");
  race(element.reader_of_warp, "read");
  race(element.reader_of_other_warp, "read");
}

void SharedArray::read(size_t index, void* out) {
  Element& element = at(index, "read");
  const Access now = my_access();
  if (!element.written)
    fail(site_,
         "read of shared array " + name_ + "[" + std::to_string(index) + "] before any write");
  check(element, index, now, false, false);
  if (element.reader.thread / kWarp != now.thread / kWarp) {
    element.reader_of_other_warp = element.reader;
    element.reader_of_warp = Access();
  } else if (element.reader.thread != now.thread) {
    element.reader_of_warp = element.reader;
  }
  element.reader = now;
  std::memcpy(out, data_.data() + index * bytes_, bytes_);
}

void SharedArray::write(size_t index, const void* value) {
  Element& element = at(index, "write");
  const Access now = my_access();
  check(element, index, now, true, false);
  element.writer = now;
  element.written = true;
  element.reader = element.reader_of_warp = element.reader_of_other_warp = Access();
  std::memcpy(data_.data() + index * bytes_, value, bytes_);
}

void SharedArray::update(size_t index, const std::function<void(void*)>& step) {
  Element& element = at(index, "atomic update");
  const Access now = my_access();
  if (!element.written)
    fail(site_,
         "update of shared array " + name_ + "[" + std::to_string(index) + "] before any write");
  check(element, index, now, true, true);
  element.atomic = now;
  element.reader = element.reader_of_warp = element.reader_of_other_warp = Access();
  step(data_.data() + index * bytes_);
}

SharedArray* static_shared(Site site, const char* name, const void* type, size_t bytes,
                           size_t element) {
  std::unique_ptr<SharedArray>& array = running->shared[{site, type, bytes}];
  if (array == nullptr) {
    running->static_bytes += bytes;
    if (running->static_bytes > kStaticShared)
      fail(site, "static shared memory of " + std::to_string(running->static_bytes) +
                     " bytes, the limit is " + std::to_string(kStaticShared));
    array = std::make_unique<SharedArray>(site, bytes, element, name);
  }
  return array.get();
}

SharedArray* dynamic_shared(Site site, size_t element) {
  if (running->dynamic == nullptr)
    running->dynamic =
        std::make_unique<SharedArray>(site, running->launch->dynamic_shared, element, "(dynamic)");
  return running->dynamic.get();
}

}  // namespace simt
