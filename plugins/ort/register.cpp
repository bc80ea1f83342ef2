// Registers TernaryMatMul in domain bitnet, for float32 and float16, when a session loads this
// library (SessionOptions.register_custom_ops_library). The library links no ONNX Runtime: it is
// handed its interface here, and asks for the one of the headers it was built with (1.21), which
// every later release still has.
#include <exception>

#include "ternary_matmul.h"

namespace bitnet_ort {
namespace {

OrtStatusPtr to_status(const std::exception& error) {
  return Ort::GetApi().CreateStatus(ORT_INVALID_ARGUMENT, error.what());
}

template <bitnet_cpu_type Type>
struct TernaryMatMulOp : Ort::CustomOpBase<TernaryMatMulOp<Type>, TernaryMatMul, true> {
  static constexpr ONNXTensorElementDataType kElement =
      Type == BITNET_CPU_FLOAT16 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16
                                 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;

  TernaryMatMulOp() { OrtCustomOp::InferOutputShapeFn = infer_shape; }

  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    try {
      *kernel = new TernaryMatMul(info, Type);
      return nullptr;
    } catch (const std::exception& error) {
      return to_status(error);
    }
  }

  const char* GetName() const { return "TernaryMatMul"; }
  const char* GetExecutionProviderType() const { return "CPUExecutionProvider"; }

  size_t GetInputTypeCount() const { return kInputs; }
  ONNXTensorElementDataType GetInputType(size_t index) const {
    if (index == kPackedWeight) return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    return index == kX ? kElement : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const {
    return index == kBias ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return kElement; }

  // Y has X's shape with N for its last dimension. Where X's shape is not known yet (it comes
  // as a shape of no dimensions), or N is missing, nothing is inferred: creating the kernel
  // and running it check both.
  static OrtStatusPtr infer_shape(const OrtCustomOp*, OrtShapeInferContext* raw) {
    try {
      Ort::ShapeInferContext context(&Ort::GetApi(), raw);
      Ort::ShapeInferContext::Shape shape = context.GetInputShape(kX);
      if (shape.empty()) return nullptr;
      for (const auto& size : shape) {
        if (size.IsInt() && size.AsInt() < 0) return nullptr;  // a dimension without a name
      }
      shape.back() = context.GetAttrInt("N");
      return context.SetOutputShape(0, shape, kElement).release();
    } catch (const std::exception&) {
      return nullptr;
    }
  }
};

// ONNX Runtime keeps pointers to a domain as long as any session that registered it.
struct Registration {
  TernaryMatMulOp<BITNET_CPU_FLOAT32> float32;
  TernaryMatMulOp<BITNET_CPU_FLOAT16> float16;
  Ort::CustomOpDomain domain{"bitnet"};

  Registration() {
    domain.Add(&float32);
    domain.Add(&float16);
  }
};

}  // namespace
}  // namespace bitnet_ort

extern "C" __attribute__((visibility("default"))) OrtStatusPtr RegisterCustomOps(
    OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (!api) {  // an interface of version 1 has what it takes to say so
    return base->GetApi(1)->CreateStatus(
        ORT_NOT_IMPLEMENTED, "bitnet_ort_cpu needs ONNX Runtime 1.22 or newer; upgrade it, or run "
                             "the model without the library");
  }
  try {
    // Made once, whichever thread opens the first session. Never freed: sessions may outlive any
    // point at which this library could.
    static auto* registration = [api] {
      Ort::InitApi(api);
      return new bitnet_ort::Registration;
    }();
    return api->AddCustomOpDomain(options, registration->domain);
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_FAIL, error.what());
  }
}
