// Every operation on the pretended GPU, by the CPU's kernels in the same memory.

#include "pretended.h"

#include <ATen/EmptyTensor.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include <set>
#include <string>

namespace pretended {

using at::IntArrayRef;
using c10::IValue;
using torch::jit::Stack;
using MaybeTensor = std::optional<Tensor>;

// A tensor's own memory, as a tensor on the CPU.
Tensor mirror(const Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  Tensor here = at::from_blob(
      tensor.data_ptr(), tensor.sizes(), tensor.strides(), [tensor](void*) {},
      tensor.options().device(at::kCPU).requires_grad(false));
  here._set_conj(tensor.is_conj());
  here._set_neg(tensor.is_neg());
  return here;
}

MaybeTensor mirror(const MaybeTensor& tensor) {
  return tensor && tensor->defined() ? MaybeTensor(mirror(*tensor)) : std::nullopt;
}

// A copy of a tensor of the CPU, on the device of another one.
Tensor onto(const Tensor& tensor, const Tensor& beside) {
  Tensor copy = at::empty_strided(
      tensor.sizes(), tensor.strides(), tensor.options().device(beside.device()));
  mirror(copy).copy_(tensor);
  return copy;
}

// --- Every operation by the CPU's kernel -----------------------------------------------------

bool takes_indices(const std::string& name) {
  static const std::set<std::string> names{"aten::index", "aten::_unsafe_index", "aten::_index_put_impl_"};
  return names.count(name) > 0;
}

// A number may be on the CPU, except where a kernel takes no numbers.
bool takes_numbers(const std::string& name) {
  static const std::set<std::string> never{
      "aten::cat", "aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::embedding",
      "aten::gather", "aten::index_select", "aten::scatter_"};
  return never.count(name) == 0;
}

template <typename Visit>
void each_tensor(const IValue& value, Visit visit) {
  if (value.isTensor()) {
    visit(value.toTensor());
  } else if (value.isTensorList()) {
    for (const Tensor& tensor : value.toTensorList()) visit(tensor);
  } else if (value.isOptionalTensorList()) {
    for (const MaybeTensor& tensor : value.toOptionalTensorList()) {
      if (tensor) visit(*tensor);
    }
  }
}

void check_devices(const std::string& name, const Stack& stack, size_t count) {
  const auto* arguments = &*(stack.end() - count);
  DeviceIndex here = -1;
  for (size_t place = 0; place < count; ++place) {
    each_tensor(arguments[place], [&](const Tensor& tensor) {
      if (!tensor.defined() || !tensor.is_cuda()) return;
      TORCH_CHECK(here < 0 || here == tensor.get_device(), name, " was given tensors of two GPUs");
      here = tensor.get_device();
    });
  }
  for (size_t place = 0; place < count; ++place) {
    if (takes_indices(name) && place == 1) continue;
    each_tensor(arguments[place], [&](const Tensor& tensor) {
      if (!tensor.defined() || tensor.is_cuda()) return;
      if (tensor.is_cpu() && tensor.dim() == 0 && takes_numbers(name)) return;
      TORCH_CHECK(false, "Expected all tensors to be on the same device, but ", name, " got one of ",
                  tensor.sizes(), " on ", tensor.device(), " beside cuda:", int(here));
    });
    if (arguments[place].isGenerator()) {
      const Device own = arguments[place].toGenerator().device();
      TORCH_CHECK(own.is_cuda(), "Expected a 'cuda' generator but found '", own, "' in ", name);
    }
  }
}

void by_the_cpu(const c10::OperatorHandle& op, Stack* stack) {
  const std::string& name = op.schema().name();
  const size_t count = op.schema().arguments().size();
  check_devices(name, *stack, count);
  for (auto value = stack->end() - count; value != stack->end(); ++value) {
    if (value->isGenerator()) {
      auto* own = value->toGenerator().unsafeGetGeneratorImpl();
      *value = static_cast<GeneratorImpl*>(own)->inner;
    }
  }
  at::native::cpu_fallback(op, stack);
}

Tensor empty(IntArrayRef size, std::optional<at::ScalarType> type, std::optional<at::Layout>,
             std::optional<Device> on, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard there(on);
  return at::detail::empty_generic(
      size, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), at::dtype_or_default(type), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> type,
                     std::optional<at::Layout>, std::optional<Device> on, std::optional<bool>) {
  const c10::OptionalDeviceGuard there(on);
  return at::detail::empty_strided_generic(
      size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), at::dtype_or_default(type));
}

Tensor& copy_(Tensor& self, const Tensor& source, bool) {
  if (self.numel() > 0) mirror(self).copy_(mirror(source));
  return self;
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool) {
  mirror(to).copy_(mirror(self));
  return to;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  if (to.sizes() != self.sizes()) to.resize_(self.sizes());
  return copy_from(self, to, false);
}

void resize_storage(c10::Storage storage, size_t size) {
  const c10::DeviceGuard there(storage.device());
  auto data = memory.allocate(size);
  memcpy(data.get(), storage.data(), std::min<size_t>(storage.nbytes(), size));
  storage.set_data_ptr_noswap(std::move(data));
  storage.set_nbytes(size);
}

void resize_storage_of(const Tensor& tensor, int64_t size) { resize_storage(tensor.storage(), size); }

const Tensor& resize_(const Tensor& self, IntArrayRef size, std::optional<at::MemoryFormat>) {
  const size_t needed = (c10::multiply_integers(size) + self.storage_offset()) * self.element_size();
  if (needed > self.storage().nbytes()) resize_storage(self.storage(), needed);
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

Tensor& set_storage(Tensor& self, c10::Storage source, int64_t offset, IntArrayRef size,
                    IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_storage_offset(offset);
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return self;
}

Tensor& set_whole_storage(Tensor& self, c10::Storage source) {
  const int64_t count = source.nbytes() / self.element_size();
  return set_storage(self, std::move(source), 0, {count}, {1});
}

at::Scalar number(const Tensor& self) { return at::_local_scalar_dense(mirror(self)); }

// --- Attention that keeps no matrix, as a GPU's does -----------------------------------------

int64_t attention_kernel(const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&, double,
                         bool, std::optional<double>, bool) {
  return int64_t(at::SDPBackend::overrideable);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor> attend(
    const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& bias,
    double dropout, bool is_causal, bool, std::optional<double> scale) {
  TORCH_CHECK(!bias || !bias->defined() || bias->is_cuda(), "Expected a mask on cuda, got one on the CPU");
  auto [found, sums] = at::_scaled_dot_product_flash_attention_for_cpu(
      mirror(query), mirror(key), mirror(value), dropout, is_causal, mirror(bias), scale);
  const Tensor none = at::empty({0}, query.options().dtype(at::kLong));
  return {onto(found, query), onto(sums, query), none, none, query.size(2), key.size(2), none, none, none};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attend_backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& bias, std::array<bool, 4>, const Tensor& found, const Tensor& sums, const Tensor&,
    const Tensor&, c10::SymInt, c10::SymInt, double dropout, bool is_causal, const Tensor&,
    const Tensor&, std::optional<double> scale) {
  auto [of_query, of_key, of_value] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      mirror(grad), mirror(query), mirror(key), mirror(value), mirror(found), mirror(sums), dropout,
      is_causal, mirror(MaybeTensor(bias)), scale);
  return {onto(of_query, query), onto(of_key, query), onto(of_value, query), Tensor()};
}

// --- Messages between processes, by gloo in the same memory ----------------------------------

IValue mirror_all(const IValue& value) {
  if (value.isTensor()) return mirror(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> mirrored;
    for (const Tensor& tensor : value.toTensorList()) mirrored.push_back(mirror(tensor));
    return mirrored;
  }
  if (value.isList() && value.toListRef().size() > 0 && value.toListRef()[0].isTensorList()) {
    c10::List<c10::List<Tensor>> mirrored;
    for (const IValue& inner : value.toListRef()) mirrored.push_back(mirror_all(inner).toTensorList());
    return mirrored;
  }
  return value;
}

void by_gloo(const c10::OperatorHandle& op, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  for (auto value = stack->end() - count; value != stack->end(); ++value) *value = mirror_all(*value);
  op.callBoxed(stack);
}

template <auto* kernel>
torch::CppFunction boxed() {
  return torch::CppFunction::makeFromBoxedFunction<kernel>();
}

const bool has_attention =
    (at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&attention_kernel), true);

}  // namespace pretended

using namespace pretended;

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(boxed<&by_the_cpu>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(pretended::empty));
  m.impl("empty_strided", TORCH_FN(pretended::empty_strided));
  m.impl("copy_", TORCH_FN(pretended::copy_));
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  m.impl("resize_", TORCH_FN(pretended::resize_));
  m.impl("set_.source_Storage", TORCH_FN(set_whole_storage));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  m.impl("_local_scalar_dense", TORCH_FN(number));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("view_as_real", TORCH_FN(at::native::view_as_real));
  m.impl("view_as_complex", TORCH_FN(at::native::view_as_complex));
  m.impl("_scaled_dot_product_fused_attention_overrideable", TORCH_FN(attend));
  m.impl("_scaled_dot_product_fused_attention_overrideable_backward", TORCH_FN(attend_backward));
  // Composed for a GPU of parts that a CPU build has not.
  m.impl("convolution", boxed<&by_the_cpu>());
  m.impl("convolution_backward", boxed<&by_the_cpu>());
}

// Torch warns of every kernel that takes another's place; these are meant to.
struct Silence final : c10::WarningHandler {
  void process(const c10::Warning&) override {}
} silence;
auto* const told = c10::WarningUtils::get_warning_handler();
const bool is_silent = (c10::WarningUtils::set_warning_handler(&silence), true);

TORCH_LIBRARY_IMPL(c10d, CUDA, m) {
  for (const char* name :
       {"broadcast_", "allreduce_", "allreduce_coalesced_", "allgather_", "_allgather_base_",
        "allgather_coalesced_", "allgather_into_tensor_coalesced_", "reduce_scatter_",
        "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_", "reduce_", "gather_", "scatter_",
        "alltoall_", "alltoall_base_", "barrier"}) {
    m.impl(name, boxed<&by_gloo>());
  }
}

const bool is_loud = (c10::WarningUtils::set_warning_handler(told), true);

TORCH_LIBRARY(pretended, m) {
  m.def("resize_storage_of(Tensor tensor, int size) -> ()");
  m.impl("resize_storage_of", c10::DispatchKey::CUDA, TORCH_FN(resize_storage_of));
}
