// A GPU that is not there: tensors that claim to be on `cuda`, with memory and kernels of the CPU.
//
// It does what a CPU build of torch leaves out for the device type CUDA: memory, of which it counts
// what is held; two devices; generators; and for every operation the CPU's kernel, behind a check
// that all operands are on one device, as a GPU demands it. What torch decides by device type, such
// as autocast, autograd's threads and which operations are composed, is torch's own.
//
// Must be loaded before torch is imported, as torch asks once for what is registered here.

#include "pretended.h"

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>

namespace pretended {

using c10::Stream;

thread_local DeviceIndex current = 0;
Memory memory;

// --- Memory ----------------------------------------------------------------------------------

std::atomic<int64_t> held[kDevices];
std::atomic<int64_t> peak[kDevices];

struct Block {
  void* data;
  size_t size;
  DeviceIndex on;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  held[block->on] -= block->size;
  free(block->data);
  delete block;
}

c10::DataPtr Memory::allocate(size_t size) {
  void* data = size ? aligned_alloc(64, (size + 63) / 64 * 64) : nullptr;
  auto* block = new Block{data, size, current};
  const int64_t now = held[current] += size;
  int64_t most = peak[current];
  while (now > most && !peak[current].compare_exchange_weak(most, now)) {
  }
  return {block->data, block, &release, gpu(current)};
}

// --- Devices, streams, generators ------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device to) const override {
    const Device before = gpu(current);
    uncheckedSetDevice(to);
    return before;
  }
  Device getDevice() const override { return gpu(current); }
  void setDevice(Device to) const override { uncheckedSetDevice(to); }
  void uncheckedSetDevice(Device to) const noexcept override {
    if (to.has_index()) current = to.index();
  }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  // One stream, in which everything is done at once.
  Stream getStream(Device of) const override { return Stream(Stream::DEFAULT, gpu(of.index())); }
  Stream getDefaultStream(Device of) const override { return getStream(of); }
  Stream getStreamFromGlobalPool(Device of, bool) const override { return getStream(of); }
  Stream getNewStream(Device of, int) const override { return getStream(of); }
  Stream exchangeStream(Stream stream) const override { return getStream(stream.device()); }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};
c10::impl::DeviceGuardImplRegistrar guard(DeviceType::CUDA, new Guard());

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override {
    static const at::Generator all[kDevices] = {
        at::make_generator<GeneratorImpl>(0), at::make_generator<GeneratorImpl>(1)};
    return all[gpu(index).index()];
  }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<GeneratorImpl>(index);
  }
  DeviceIndex deviceCount() const override { return kDevices; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex index) const override { current = index; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    return std::exchange(current, index);
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return exchangeDevice(index); }
  Device getDeviceFromPtr(void*) const override { return gpu(current); }
  at::Allocator* getPinnedMemoryAllocator() const override {
    return c10::GetAllocator(DeviceType::CPU);
  }
  void deviceSynchronize(DeviceIndex) const override {}
};

const bool has_memory = (c10::SetAllocator(DeviceType::CUDA, &memory, /*priority=*/255), true);

}  // namespace pretended

namespace at {
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", pretended::Hooks);
}

extern "C" {
int64_t pretended_held(int on) { return pretended::held[on]; }
int64_t pretended_peak(int on) { return pretended::peak[on]; }
void pretended_reset_peak(int on) { pretended::peak[on] = pretended::held[on].load(); }
int pretended_current() { return pretended::current; }
void pretended_set_current(int index) { pretended::current = c10::DeviceIndex(index); }
}
