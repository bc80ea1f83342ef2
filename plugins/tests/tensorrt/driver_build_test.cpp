// The build phase: types, shapes with dynamic dimensions, formats, tactics, workspace, timing
// cache, and what is refused there.

#include <set>

#include "harness.h"
#include "player.h"
#include "tensorrt/fields.h"

namespace {

using nvinfer1::DataType;
using nvinfer1::TensorFormat;
using player::Create;
using player::Plugin;
using player::TheLibrary;

reference::Layer MakeLayer(int32_t k, int32_t n, int32_t group_size = 0, int32_t bits = 8) {
  reference::Layer layer;
  layer.k = k;
  layer.n = n;
  layer.group_size = group_size;
  layer.activation_bits = bits;
  return layer;
}

TEST(output_type_follows_x) {
  Plugin plugin = Create(MakeLayer(64, 8));
  for (const DataType x : {DataType::kFLOAT, DataType::kHALF}) {
    const DataType types[] = {x, DataType::kINT32, DataType::kFLOAT, DataType::kFLOAT};
    for (const int32_t count : {3, 4}) {
      DataType y = DataType::kBOOL;
      CHECK_EQ(plugin.build->getOutputDataTypes(&y, 1, types, count), 0);
      CHECK(y == x);
    }
  }
}

TEST(other_types_and_counts_are_refused) {
  Plugin plugin = Create(MakeLayer(64, 8));
  const auto code = [&](std::vector<DataType> types, int32_t outputs = 1) {
    DataType y[2];
    return plugin.build->getOutputDataTypes(y, outputs, types.data(),
                                            static_cast<int32_t>(types.size()));
  };
  const DataType f = DataType::kFLOAT;
  const DataType h = DataType::kHALF;
  const DataType i = DataType::kINT32;
  CHECK(code({DataType::kBF16, i, f, f}) != 0);
  CHECK_SAYS(TheLibrary().logger.last(), "X must be float32 or float16");
  CHECK(code({DataType::kINT8, i, f, f}) != 0);
  CHECK(code({f, DataType::kINT8, f, f}) != 0);
  CHECK_SAYS(TheLibrary().logger.last(), "packed_weight must be int32");
  CHECK(code({h, i, h, f}) != 0);
  CHECK(code({h, i, f, h}) != 0);
  CHECK_SAYS(TheLibrary().logger.last(), "scale and bias must be float32");
  CHECK(code({f, i}) != 0);
  CHECK(code({f, i, f, f, f}) != 0);
  CHECK(code({f, i, f}, 2) != 0);
  CHECK_SAYS(TheLibrary().logger.last(), "got 3 inputs and 2 outputs");
}

// sizes of X, packed_weight, scale[, bias] -> sizes of Y; -2 stands for a refusal.
std::vector<int64_t> InferShape(Plugin& plugin, const std::vector<std::vector<int64_t>>& sizes) {
  fakes::FakeExprBuilder builder;
  std::vector<nvinfer1::DimsExprs> inputs;
  for (const auto& one : sizes) inputs.push_back(builder.dims(one));
  nvinfer1::DimsExprs y{};
  if (plugin.build->getOutputShapes(inputs.data(), static_cast<int32_t>(inputs.size()), nullptr, 0,
                                    &y, 1, builder) != 0) {
    return {-2};
  }
  std::vector<int64_t> result;
  for (int32_t i = 0; i < y.nbDims; ++i) {
    // A leading size must be X's own expression, not a copy of its value.
    if (i + 1 < y.nbDims && y.d[i] != inputs[0].d[i]) return {-3};
    result.push_back(y.d[i]->isConstant() ? y.d[i]->getConstantValue() : -1);
  }
  return result;
}

using Sizes = std::vector<int64_t>;

TEST(output_shape_keeps_leading_sizes) {
  Plugin plugin = Create(MakeLayer(300, 7));
  CHECK(InferShape(plugin, {{5, 300}, {7, 20}, {7}, {7}}) == Sizes({5, 7}));
  CHECK(InferShape(plugin, {{-1, 300}, {7, 20}, {1}}) == Sizes({-1, 7}));
  CHECK(InferShape(plugin, {{-1, -1, 300}, {7, 20}, {1}, {7}}) == Sizes({-1, -1, 7}));
  CHECK(InferShape(plugin, {{2, 3, -1, 300}, {7, 20}, {7}, {7}}) == Sizes({2, 3, -1, 7}));
  CHECK(InferShape(plugin, {{2, -1}, {7, 20}, {7}, {7}}) == Sizes({2, 7}));  // K not known yet
  Plugin grouped = Create(MakeLayer(300, 7, 100));
  CHECK(InferShape(grouped, {{-1, 300}, {7, 20}, {7, 3}}) == Sizes({-1, 7}));
}

TEST(wrong_shapes_are_refused) {
  Plugin plugin = Create(MakeLayer(300, 7));
  const auto refuses = [&](const std::vector<Sizes>& sizes, const char* says) {
    CHECK(InferShape(plugin, sizes) == Sizes({-2}));
    CHECK_SAYS(TheLibrary().logger.last(), says);
  };
  refuses({{300}, {7, 20}, {7}, {7}}, "X must be [..., 300] of rank 2 or more, got [300]");
  refuses({{5, 301}, {7, 20}, {7}, {7}}, "X must be");
  refuses({{5, 300}, {7, 19}, {7}, {7}}, "packed_weight must be [7, 20] int32, got [7, 19]");
  refuses({{5, 300}, {8, 20}, {7}, {7}}, "packed_weight");
  refuses({{5, 300}, {140}, {7}, {7}}, "packed_weight");
  refuses({{5, 300}, {7, 20}, {6}, {7}}, "scale must be [1] or [7], got [6]");
  refuses({{5, 300}, {7, 20}, {7, 1}, {7}}, "scale");
  refuses({{5, 300}, {7, 20}, {7}, {1, 7}}, "bias must be [7], got [1, 7]");
  refuses({{5, 300}, {7, 20}, {7}, {1}}, "bias");
  refuses({{5, 300}, {7, 20}}, "got 2 inputs");
  Plugin grouped = Create(MakeLayer(300, 7, 100));
  CHECK(InferShape(grouped, {{5, 300}, {7, 20}, {7}}) == Sizes({-2}));
  CHECK_SAYS(TheLibrary().logger.last(), "scale must be [7, 3], got [7]");
}

// TensorRT walks the positions and tries types and formats at each, given what was accepted
// before. Exactly two combinations may come out: everything linear, X and Y both fp32 or fp16.
void Enumerate(Plugin& plugin, int32_t inputs, int32_t position,
               std::vector<nvinfer1::DynamicPluginTensorDesc>& tensors,
               std::multiset<std::string>& found) {
  if (position == inputs + 1) {
    std::string combination;
    for (const auto& tensor : tensors) {
      combination += std::to_string(static_cast<int32_t>(tensor.desc.type));
    }
    found.insert(combination);
    return;
  }
  for (int32_t type = 0; type < nvinfer1::EnumMax<DataType>(); ++type) {
    for (int32_t format = 0; format < nvinfer1::EnumMax<TensorFormat>(); ++format) {
      tensors[position].desc.type = static_cast<DataType>(type);
      tensors[position].desc.format = static_cast<TensorFormat>(format);
      if (plugin.build->supportsFormatCombination(position, tensors.data(), inputs, 1)) {
        Enumerate(plugin, inputs, position + 1, tensors, found);
      }
    }
  }
}

TEST(only_fp32_and_fp16_linear_combinations) {
  Plugin plugin = Create(MakeLayer(64, 8));
  for (const int32_t inputs : {3, 4}) {
    std::vector<nvinfer1::DynamicPluginTensorDesc> tensors(static_cast<size_t>(inputs) + 1);
    std::multiset<std::string> found;
    Enumerate(plugin, inputs, 0, tensors, found);
    // DataType: kFLOAT 0, kHALF 1, kINT32 3
    const std::multiset<std::string> expected =
        inputs == 3 ? std::multiset<std::string>{"0300", "1301"}
                    : std::multiset<std::string>{"03000", "13001"};
    CHECK(found == expected);
  }
  std::vector<nvinfer1::DynamicPluginTensorDesc> tensors(8);
  CHECK(!plugin.build->supportsFormatCombination(0, tensors.data(), 2, 1));
  CHECK(!plugin.build->supportsFormatCombination(5, tensors.data(), 4, 1));
  CHECK(!plugin.build->supportsFormatCombination(-1, tensors.data(), 4, 1));
}

int32_t Configure(Plugin& plugin, const reference::Layer& layer, DataType type, int64_t min,
                  int64_t opt, int64_t max) {
  const auto in = player::ProfileDescs(layer, type, min, opt, max);
  const auto out = player::ProfileOutput(layer, type, min, opt, max);
  return plugin.build->configurePlugin(in.data(), static_cast<int32_t>(in.size()), &out, 1);
}

std::vector<int32_t> Tactics(Plugin& plugin) {
  std::vector<int32_t> tactics(static_cast<size_t>(plugin.build->getNbTactics()), -1);
  CHECK_EQ(plugin.build->getValidTactics(tactics.data(), static_cast<int32_t>(tactics.size())), 0);
  return tactics;
}

TEST(tactics_are_unique_nonzero_and_depend_on_shape_and_type) {
  const reference::Layer quantized = MakeLayer(256, 32);
  const reference::Layer floating = MakeLayer(256, 32, 0, 0);
  std::set<std::vector<int32_t>> different;
  for (const auto* layer : {&quantized, &floating}) {
    for (const DataType type : {DataType::kFLOAT, DataType::kHALF}) {
      for (const int64_t m : {1, 64}) {
        Plugin plugin = Create(*layer);
        CHECK_EQ(Configure(plugin, *layer, type, 1, m, 128), 0);
        const std::vector<int32_t> tactics = Tactics(plugin);
        CHECK(!tactics.empty());
        CHECK_EQ(std::set<int32_t>(tactics.begin(), tactics.end()).size(), tactics.size());
        CHECK_EQ(std::count(tactics.begin(), tactics.end(), 0), 0);
        for (const int32_t tactic : tactics) CHECK_EQ(plugin.runtime->setTactic(tactic), 0);
        CHECK_SAYS(TheLibrary().logger.last(), m == 1 ? "timed with 1 rows" : "timed with 64 rows");
        different.insert(tactics);
      }
    }
  }
  CHECK(different.size() >= 4);  // by activation_bits and by M at the least
}

TEST(tactics_before_configuration_and_unknown_ones_are_refused) {
  Plugin plugin = Create(MakeLayer(64, 8));
  CHECK_EQ(plugin.build->getNbTactics(), 0);
  int32_t one = 0;
  CHECK(plugin.build->getValidTactics(&one, 1) != 0);
  CHECK(plugin.runtime->setTactic(999) != 0);
  CHECK_SAYS(TheLibrary().logger.last(), "built with another version");
  CHECK_EQ(plugin.runtime->setTactic(0), 0);  // TensorRT's default
}

TEST(wrong_profiles_are_refused) {
  const reference::Layer layer = MakeLayer(64, 8);
  Plugin plugin = Create(MakeLayer(128, 8));
  CHECK(Configure(plugin, layer, DataType::kFLOAT, 1, 2, 4) != 0);
  Plugin right = Create(layer);
  CHECK(Configure(right, layer, DataType::kBF16, 1, 2, 4) != 0);
  CHECK(Configure(right, layer, DataType::kFLOAT, 1, 2, int64_t{1} << 31) != 0);
  CHECK_SAYS(TheLibrary().logger.last(), "fewer than 2^31 rows");
}

TEST(workspace_covers_every_smaller_shape) {
  const reference::Layer layer = MakeLayer(300, 40);
  Plugin plugin = Create(layer);
  size_t before = 0;
  for (const int64_t max : {1, 2, 8, 9, 64, 65, 1000}) {
    const auto in = player::ProfileDescs(layer, DataType::kHALF, 1, 1, max);
    const auto out = player::ProfileOutput(layer, DataType::kHALF, 1, 1, max);
    const size_t bytes = plugin.build->getWorkspaceSize(in.data(), 4, &out, 1);
    CHECK(bytes >= before);
    before = bytes;
  }
  CHECK(before > 0);
}

// What engines of this serialization version were given when they were built. If a kernel needs
// more now, they must be refused: raise kSerializationVersion, then write the new sizes here.
TEST(stored_engines_have_the_workspace_for_this_library) {
  struct {
    reference::Layer layer;
    int64_t max;
    size_t bytes;
  } const kept[] = {{MakeLayer(384, 1536), 1, 1024},
                    {MakeLayer(384, 1536), 4096, 1605632},
                    {MakeLayer(4096, 4096), 64, 8651264},
                    {MakeLayer(4096, 4096, 128), 16, 2164992},
                    {MakeLayer(2560, 6912, 0, 0), 8, 1105920}};
  for (const auto& [layer, max, bytes] : kept) {
    Plugin plugin = Create(layer);
    const auto in = player::ProfileDescs(layer, DataType::kHALF, 1, 1, max);
    const auto out = player::ProfileOutput(layer, DataType::kHALF, 1, 1, max);
    CHECK_EQ(plugin.build->getWorkspaceSize(in.data(), static_cast<int32_t>(in.size()), &out, 1),
             bytes);
  }
  CHECK_EQ(bitnet::trt::kSerializationVersion, 2);
}

TEST(timing_cache_id_tells_layers_apart) {
  const auto id = [](const reference::Layer& layer) {
    Plugin plugin = Create(layer);
    return std::string(plugin.build->getTimingCacheID());
  };
  CHECK_EQ(id(MakeLayer(64, 8)), id(MakeLayer(64, 8)));
  const std::set<std::string> all{id(MakeLayer(64, 8)), id(MakeLayer(128, 8)), id(MakeLayer(64, 9)),
                                  id(MakeLayer(64, 8, 32)), id(MakeLayer(64, 8, 0, 0))};
  CHECK_EQ(all.size(), 5u);
  CHECK_SAYS(*all.begin(), "kernels=");
  CHECK_SAYS(*all.begin(), "tensor_cores=");
}

}  // namespace
