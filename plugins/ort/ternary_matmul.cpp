// See ternary_matmul.h.
#include "ternary_matmul.h"

#include <atomic>
#include <vector>

#include "parallel.h"

namespace bitnet_ort {
namespace {

std::string to_string(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

std::vector<int64_t> shape_of(Ort::ConstValue value) {
  return value.GetTensorTypeAndShapeInfo().GetShape();
}

// An attribute, or `missing` where the node has none (-1: it must have it).
int64_t attribute(const Ort::ConstKernelInfo& info, const char* name, int64_t missing) {
  int64_t value = 0;
  OrtStatus* status = Ort::GetApi().KernelInfoGetAttribute_int64(info, name, &value);
  if (!status) return value;
  Ort::GetApi().ReleaseStatus(status);
  if (missing >= 0) return missing;
  throw Ort::Exception("TernaryMatMul needs the integer attribute " + std::string(name) +
                           "; export the model again",
                       ORT_INVALID_ARGUMENT);
}

Ort::ConstValue constant(const Ort::ConstKernelInfo& info, Input index) {
  int is_constant = 0;
  Ort::ConstValue value = info.GetTensorConstantInput(index, &is_constant);
  return is_constant ? value : Ort::ConstValue{};
}

// What the tasks of one product share. failed: the status of a task that did not end well.
struct Product {
  const bitnet_cpu_weights* weights;
  const void* x;
  void* y;
  void* workspace;
  int64_t M;
  bitnet_cpu_type type;
  Grid grid;
  int64_t prepare_parts;
  std::atomic<bitnet_cpu_status> failed{BITNET_CPU_OK};

  void prepare(size_t task) {
    const int64_t part = int64_t(task);
    note(bitnet_cpu_prepare(weights, x, type, M, piece_begin(M, prepare_parts, part),
                            piece_begin(M, prepare_parts, part + 1), workspace));
  }

  void multiply(size_t task) {
    const int64_t row = int64_t(task) / grid.panel_parts, panel = int64_t(task) % grid.panel_parts;
    const int64_t panels = bitnet_cpu_panels(weights);
    note(bitnet_cpu_multiply(weights, workspace, M, piece_begin(M, grid.row_parts, row),
                             piece_begin(M, grid.row_parts, row + 1),
                             piece_begin(panels, grid.panel_parts, panel),
                             piece_begin(panels, grid.panel_parts, panel + 1), y, type));
  }

  void note(bitnet_cpu_status status) {
    if (status != BITNET_CPU_OK) failed = status;
  }
};

// Runs step(task) for every task: here if there is one, else in the session's thread pool.
template <void (Product::*Step)(size_t)>
void for_each_task(const Ort::KernelContext& context, Product& product, int64_t tasks) {
  const auto step = [](void* p, size_t task) { (static_cast<Product*>(p)->*Step)(task); };
  if (tasks == 1)
    step(&product, 0);
  else
    context.ParallelFor(step, size_t(tasks), 0, &product);
}

// Memory of the session's arena for the time of one run. Throws where there is none.
class Scratch {
 public:
  Scratch(OrtAllocator* allocator, size_t bytes)
      : allocator_(allocator), memory_(allocator->Alloc(allocator, bytes)) {
    if (!memory_)
      throw Ort::Exception("no " + std::to_string(bytes) + " bytes of workspace", ORT_FAIL);
  }
  ~Scratch() { allocator_->Free(allocator_, memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() const { return memory_; }

 private:
  OrtAllocator* allocator_;
  void* memory_;
};

}  // namespace

TernaryMatMul::TernaryMatMul(const OrtKernelInfo* raw, bitnet_cpu_type type) : type_(type) {
  const Ort::ConstKernelInfo info{raw};
  name_ = info.GetNodeName();
  attributes_ = {attribute(info, "K", -1), attribute(info, "N", -1),
                 attribute(info, "group_size", 0), attribute(info, "activation_bits", 8)};
  OrtAllocator* allocator = nullptr;
  Ort::ThrowOnError(Ort::GetApi().KernelInfoGetAllocator(raw, OrtMemTypeDefault, &allocator));
  allocator_.reset(allocator);
  const bool has_bias = info.GetInputCount() > kBias && !info.GetInputName(kBias).empty();
  const Ort::ConstValue packed = constant(info, kPackedWeight), scale = constant(info, kScale);
  const Ort::ConstValue bias = has_bias ? constant(info, kBias) : Ort::ConstValue{};
  if (packed && scale && (bias || !has_bias)) weights_ = repack(packed, scale, bias);
}

void TernaryMatMul::fail(const std::string& what) const {
  throw Ort::Exception("bitnet::TernaryMatMul " + name_ + ": " + what, ORT_INVALID_ARGUMENT);
}

Weights TernaryMatMul::repack(Ort::ConstValue packed, Ort::ConstValue scale,
                              Ort::ConstValue bias) const {
  const Attributes& at = attributes_;
  const std::string sizes = " (K=" + std::to_string(at.K) + ", N=" + std::to_string(at.N) +
                            ", group_size=" + std::to_string(at.group_size) +
                            ", activation_bits=" + std::to_string(at.activation_bits) + ")";
  if (bias && at.N > 0 && shape_of(bias) != std::vector<int64_t>{at.N})
    fail("bias is " + to_string(shape_of(bias)) + ", it must be [N]" + sizes);
  bitnet_cpu_layer layer{};
  layer.K = at.K;
  layer.N = at.N;
  layer.group_size = at.group_size;
  layer.activation_bits = at.activation_bits;
  layer.packed_weight = packed.GetTensorData<uint8_t>();
  layer.packed_weight_bytes = packed.GetTensorTypeAndShapeInfo().GetElementCount();
  layer.scale = scale.GetTensorData<float>();
  layer.scale_count = scale.GetTensorTypeAndShapeInfo().GetElementCount();
  layer.bias = bias ? bias.GetTensorData<float>() : nullptr;
  bitnet_cpu_weights* weights = nullptr;
  const bitnet_cpu_status status = bitnet_cpu_create(&layer, &weights);
  if (status == BITNET_CPU_OK) return Weights(weights);
  std::string where = sizes;
  if (status == BITNET_CPU_BAD_SHAPE)
    where += "; packed_weight is " + to_string(shape_of(packed)) + ", scale " +
             to_string(shape_of(scale));
  fail(bitnet_cpu_status_string(status) + where);
}

OrtStatusPtr TernaryMatMul::ComputeV2(OrtKernelContext* context) const noexcept {
  try {
    compute(context);
    return nullptr;
  } catch (const Ort::Exception& error) {
    return Ort::GetApi().CreateStatus(error.GetOrtErrorCode(), error.what());
  } catch (const std::exception& error) {
    return Ort::GetApi().CreateStatus(ORT_FAIL, error.what());
  }
}

void TernaryMatMul::compute(OrtKernelContext* raw) const {
  const Ort::KernelContext context{raw};
  const Ort::ConstValue x = context.GetInput(kX);
  std::vector<int64_t> shape = shape_of(x);
  if (shape.empty() || shape.back() != attributes_.K)
    fail("X is " + to_string(shape) + ", its last dimension must be K=" +
         std::to_string(attributes_.K));
  int64_t M = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) M *= shape[i];
  shape.back() = attributes_.N;
  Ort::UnownedValue y = context.GetOutput(0, shape);
  if (M == 0) return;

  Weights repacked;
  if (!weights_) {
    const bool has_bias = context.GetInputCount() > kBias;
    repacked = repack(context.GetInput(kPackedWeight), context.GetInput(kScale),
                      has_bias ? context.GetInput(kBias) : Ort::ConstValue{});
  }
  const bitnet_cpu_weights* weights = weights_ ? weights_.get() : repacked.get();
  const Scratch workspace(allocator_.get(), bitnet_cpu_workspace_bytes(weights, M));
  Product product{weights,
                  x.GetTensorRawData(),
                  y.GetTensorMutableRawData(),
                  workspace.get(),
                  M,
                  type_,
                  Grid::of(M, attributes_.K, attributes_.N, bitnet_cpu_panels(weights)),
                  std::min(M, 1 + M * attributes_.K / kTaskInputs)};
  for_each_task<&Product::prepare>(context, product, product.prepare_parts);
  for_each_task<&Product::multiply>(context, product, product.grid.tasks());
  if (product.failed != BITNET_CPU_OK) fail(bitnet_cpu_status_string(product.failed));
}

}  // namespace bitnet_ort
