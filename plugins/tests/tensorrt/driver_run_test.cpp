// From a built layer to its results: every tactic is set, serialized, loaded in the runtime phase,
// attached to a context and run at sizes the profile allows, over poisoned outputs.

#include <random>

#include "harness.h"
#include "player.h"

namespace {

using nvinfer1::DataType;
using nvinfer1::TensorRTPhase;
using player::Create;
using player::Plugin;
using player::TheLibrary;

struct Profile {
  int64_t opt;
  int64_t max;
};

std::vector<float> RandomRows(int64_t rows, int32_t k, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(rows * k));
  for (float& value : x) value = normal(random);
  return x;
}

// fp32 results differ from the reference by the order of a few fp32 roundings (2^-24 each) on
// sums of magnitude up to sqrt(K) * 1.5; fp16 ones by half a unit in the last of 11 bits.
bool Close(const std::vector<float>& got, const std::vector<float>& expected, DataType type) {
  if (got.size() != expected.size()) return false;
  for (size_t i = 0; i < got.size(); ++i) {
    const float tolerance = type == DataType::kHALF ? 1e-3f * std::fabs(expected[i]) + 1e-3f
                                                    : 1e-5f * std::fabs(expected[i]) + 2e-5f;
    if (!(std::fabs(got[i] - expected[i]) <= tolerance)) {  // NaN is never close
      std::printf("  element %zu is %g, expected %g\n", i, double{got[i]}, double{expected[i]});
      return false;
    }
  }
  return true;
}

// Build with this profile; the plugin as it stands before timing, and its workspace.
size_t Configure(Plugin& plugin, const reference::Layer& layer, DataType type, Profile profile) {
  const auto in = player::ProfileDescs(layer, type, 1, profile.opt, profile.max);
  const auto out = player::ProfileOutput(layer, type, 1, profile.opt, profile.max);
  const auto count = static_cast<int32_t>(in.size());
  CHECK_EQ(plugin.build->configurePlugin(in.data(), count, &out, 1), 0);
  return plugin.build->getWorkspaceSize(in.data(), count, &out, 1);
}

void CheckRuns(Plugin& plugin, const reference::Layer& layer, DataType type, int64_t rows,
               size_t workspace) {
  const std::vector<float> x = player::RoundTo(
      type, RandomRows(rows, layer.k, static_cast<uint32_t>(rows)));
  const player::RunResult run = player::Run(plugin, layer, type, x, {rows}, workspace);
  CHECK_EQ(run.code, 0);
  CHECK(run.intact);
  CHECK(Close(run.y, player::RoundTo(type, layer.Apply(x)), type));
}

// The whole life of a layer, once for each tactic.
void PlayThrough(const reference::Layer& layer, DataType type, Profile profile) {
  Plugin built = Create(layer);
  const size_t workspace = Configure(built, layer, type, profile);
  std::vector<int32_t> tactics(static_cast<size_t>(built.build->getNbTactics()));
  CHECK_EQ(built.build->getValidTactics(tactics.data(), built.build->getNbTactics()), 0);
  CHECK(!tactics.empty());
  for (const int32_t tactic : tactics) {
    Plugin timed(built.object->clone());
    CHECK_EQ(timed.runtime->setTactic(tactic), 0);
    CheckRuns(timed, layer, type, profile.opt, workspace);

    const player::Stored stored(timed, tactic);
    Plugin loaded = Create(stored.list(), TensorRTPhase::kRUNTIME);
    CHECK(loaded);
    CHECK_EQ(loaded.runtime->setTactic(stored.tactic), 0);
    Plugin attached(loaded.runtime->attachToContext(nullptr));
    for (const int64_t rows : {int64_t{1}, int64_t{3}, profile.max}) {
      CheckRuns(attached, layer, type, rows, workspace);
    }
  }
}

reference::Layer MakeLayer(int32_t k, int32_t n, int32_t group_size, int32_t bits,
                           bool scale_per_row, bool has_bias) {
  reference::Layer layer;
  layer.k = k;
  layer.n = n;
  layer.group_size = group_size;
  layer.activation_bits = bits;
  layer.scale_per_row = scale_per_row;
  layer.has_bias = has_bias;
  layer.Randomize(static_cast<uint32_t>(k * 31 + n));
  return layer;
}

TEST(fp32_channel_scale_with_bias) {
  PlayThrough(MakeLayer(100, 33, 0, 8, true, true), DataType::kFLOAT, {1, 17});
}
TEST(fp16_tensor_scale_without_bias) {
  PlayThrough(MakeLayer(300, 5, 0, 8, false, false), DataType::kHALF, {4, 17});
}
TEST(fp32_group_scale) {
  PlayThrough(MakeLayer(192, 9, 64, 8, true, true), DataType::kFLOAT, {16, 20});
}
TEST(fp16_one_output) {
  PlayThrough(MakeLayer(64, 1, 0, 8, true, true), DataType::kHALF, {16, 17});
}
TEST(float_activations_fp32) {
  PlayThrough(MakeLayer(100, 17, 0, 0, true, true), DataType::kFLOAT, {1, 17});
}
TEST(float_activations_fp16_groups) {
  PlayThrough(MakeLayer(128, 16, 32, 0, true, false), DataType::kHALF, {16, 17});
}

// X of rank 4: the leading sizes are rows in order.
TEST(leading_sizes_are_rows) {
  const reference::Layer layer = MakeLayer(64, 8, 0, 8, true, true);
  Plugin plugin = Create(layer);
  const size_t workspace = Configure(plugin, layer, DataType::kFLOAT, {12, 12});
  const std::vector<float> x = RandomRows(12, layer.k, 7);
  const auto run = player::Run(plugin, layer, DataType::kFLOAT, x, {2, 3, 2}, workspace);
  CHECK_EQ(run.code, 0);
  CHECK(Close(run.y, layer.Apply(x), DataType::kFLOAT));
}

TEST(an_empty_batch_is_nothing_to_do) {
  const reference::Layer layer = MakeLayer(64, 8, 0, 8, true, true);
  Plugin plugin = Create(layer);
  Configure(plugin, layer, DataType::kFLOAT, {1, 4});
  const auto run = player::Run(plugin, layer, DataType::kFLOAT, {}, {0}, 0);
  CHECK_EQ(run.code, 0);
}

TEST(clones_do_not_share_state) {
  const reference::Layer layer = MakeLayer(64, 8, 0, 8, true, true);
  Plugin first = Create(layer);
  const size_t workspace = Configure(first, layer, DataType::kFLOAT, {1, 4});
  Plugin second(first.object->clone());
  first.object.reset();  // the clone must stand alone
  CheckRuns(second, layer, DataType::kFLOAT, 4, workspace);
  CHECK_EQ(std::string(second.build->getMetadataString()),
           "K=64 N=8 group_size=0 activation_bits=8");
}

TEST(wrong_run_time_shapes_are_refused) {
  const reference::Layer layer = MakeLayer(64, 8, 0, 8, true, true);
  Plugin plugin = Create(layer);
  const auto code = [&](std::vector<nvinfer1::PluginTensorDesc> in) {
    const auto out = fakes::MakeDesc(DataType::kFLOAT, {2, 8});
    return plugin.runtime->onShapeChange(in.data(), static_cast<int32_t>(in.size()), &out, 1);
  };
  auto good = player::InputDescs(layer, DataType::kFLOAT, {2});
  CHECK_EQ(code(good), 0);
  auto in = good;
  in[0] = fakes::MakeDesc(DataType::kFLOAT, {2, 65});
  CHECK(code(in) != 0);
  in[0] = fakes::MakeDesc(DataType::kFLOAT, {64});
  CHECK(code(in) != 0);
  in[0] = fakes::MakeDesc(DataType::kFLOAT, {-1, 64});
  CHECK(code(in) != 0);
  in[0] = fakes::MakeDesc(DataType::kINT8, {2, 64});
  CHECK(code(in) != 0);
  in = good;
  in[2] = fakes::MakeDesc(DataType::kFLOAT, {7});
  CHECK(code(in) != 0);
  CHECK_SAYS(TheLibrary().logger.last(), "TernaryMatMul 'layer': scale must be [1] or [8]");
}

// enqueue has no count of inputs: before any shape was announced it must not guess.
TEST(enqueue_before_shapes_is_refused) {
  const reference::Layer layer = MakeLayer(64, 8, 0, 8, true, true);
  Plugin plugin = Create(layer);
  const auto in = player::InputDescs(layer, DataType::kFLOAT, {2});
  const auto out = fakes::MakeDesc(DataType::kFLOAT, {2, 8});
  const void* inputs[4] = {};
  void* outputs[1] = {};
  CHECK(plugin.runtime->enqueue(in.data(), &out, inputs, outputs, nullptr, nullptr) != 0);
}

}  // namespace
