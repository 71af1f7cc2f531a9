// What the parts of the pretended GPU share.

#pragma once

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

namespace pretended {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;

constexpr DeviceIndex kDevices = 2;
extern thread_local DeviceIndex current;

inline Device gpu(DeviceIndex index) {
  return Device(DeviceType::CUDA, index < 0 ? current : index);
}

// Memory, of which each device counts what is held.
struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override;
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t count) const override { memcpy(to, from, count); }
};
extern Memory memory;

// A CPU's generator that claims to be of a GPU.
struct GeneratorImpl final : c10::GeneratorImpl {
  at::Generator inner = at::detail::createCPUGenerator();
  explicit GeneratorImpl(DeviceIndex index)
      : c10::GeneratorImpl(gpu(index), c10::DispatchKeySet(c10::DispatchKey::CUDA)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    inner.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  c10::GeneratorImpl* clone_impl() const override {
    auto* copy = new GeneratorImpl(device_.index());
    copy->inner = inner.clone();
    return copy;
  }
};

}  // namespace pretended
