// What the plugin decides, seen through recorded launches: tactics by device, the kernel by the
// actual number of rows, arguments handed on, failures reported, nothing allocated in enqueue.

#include <cstdlib>
#include <new>
#include <set>

#include "harness.h"
#include "recording_kernels.h"
#include "tensorrt/plugin.h"
#include "tensorrt_fakes.h"

// Every allocation of this program, the plugin's included, since both are linked together.
static int g_allocations = 0;
static int g_plugin_allocations = 0;  // during onShapeChange and enqueue alone
void* operator new(size_t bytes) {
  ++g_allocations;
  if (void* memory = std::malloc(bytes)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace {

using bitnet::KernelFamily;
using bitnet::Status;
using bitnet::trt::Config;
using bitnet::trt::TernaryMatMulPlugin;
using nvinfer1::DataType;
using recording::State;
using recording::TheState;

constexpr int64_t kK = 128;
constexpr int64_t kN = 16;

Config MakeConfig(int32_t bits = 8) { return {static_cast<int32_t>(kK), kN, 0, bits, 0}; }

int32_t Id(KernelFamily family) { return static_cast<int32_t>(family); }

std::vector<nvinfer1::DynamicPluginTensorDesc> Profile(DataType type, int64_t opt, int64_t max) {
  const auto fixed = [](DataType t, std::vector<int64_t> sizes) {
    return fakes::MakeDynamic(t, sizes, sizes, sizes);
  };
  return {fakes::MakeDynamic(type, {1, kK}, {opt, kK}, {max, kK}),
          fixed(DataType::kINT32, {kN, kK / 16}), fixed(DataType::kFLOAT, {kN}),
          fixed(DataType::kFLOAT, {kN})};
}

void Configure(TernaryMatMulPlugin& plugin, int64_t opt, int64_t max = 256,
               DataType type = DataType::kHALF) {
  const auto in = Profile(type, opt, max);
  nvinfer1::DynamicPluginTensorDesc out{};
  CHECK_EQ(plugin.configurePlugin(in.data(), 4, &out, 1), 0);
}

std::set<int32_t> Tactics(TernaryMatMulPlugin& plugin) {
  std::vector<int32_t> tactics(static_cast<size_t>(plugin.getNbTactics()));
  CHECK_EQ(plugin.getValidTactics(tactics.data(), plugin.getNbTactics()), 0);
  return {tactics.begin(), tactics.end()};
}

// Addresses the plugin has to hand on unchanged.
char g_memory[8];
const void* const kInputs[] = {g_memory, g_memory + 1, g_memory + 2, g_memory + 3};
void* const kOutputs[] = {g_memory + 4};

// Announces a shape and runs; inputs: 3 or 4.
int32_t Run(TernaryMatMulPlugin& plugin, int64_t rows, int32_t inputs = 4,
            DataType type = DataType::kHALF) {
  const nvinfer1::PluginTensorDesc in[] = {
      fakes::MakeDesc(type, {rows, kK}), fakes::MakeDesc(DataType::kINT32, {kN, kK / 16}),
      fakes::MakeDesc(DataType::kFLOAT, {kN}), fakes::MakeDesc(DataType::kFLOAT, {kN})};
  const auto out = fakes::MakeDesc(type, {rows, kN});
  const int before = g_allocations;
  int32_t code = plugin.onShapeChange(in, inputs, &out, 1);
  if (code == 0) {
    code = plugin.enqueue(in, &out, kInputs, kOutputs, g_memory + 5,
                          reinterpret_cast<cudaStream_t>(g_memory + 6));
  }
  g_plugin_allocations += g_allocations - before;
  return code;
}

TEST(tensor_core_tactics_only_where_they_are_real) {
  TheState() = State();
  for (const bool real : {false, true}) {
    TheState().device.real_tensor_cores = real;
    TernaryMatMulPlugin plugin(MakeConfig(), "layer");
    Configure(plugin, 64);
    CHECK_EQ(Tactics(plugin).count(Id(KernelFamily::kTileImma)), real ? 1u : 0u);
    CHECK_EQ(Tactics(plugin).count(Id(KernelFamily::kTileDp4a)), 1u);
    CHECK_EQ(Tactics(plugin).count(Id(KernelFamily::kNaive)), 0u);
    CHECK_EQ(Tactics(plugin).count(Id(KernelFamily::kGemvDp4a)), 0u);  // 64 rows
  }
  TernaryMatMulPlugin floating(MakeConfig(0), "layer");
  Configure(floating, 1);
  CHECK(Tactics(floating) == std::set<int32_t>({Id(KernelFamily::kGemvFloat),
                                                Id(KernelFamily::kTileFloat),
                                                Id(KernelFamily::kTileHmma)}));
}

TEST(timing_cache_id_tells_cards_apart) {
  TheState() = State();
  std::set<std::string> ids;
  for (const bool real : {false, true}) {
    TheState().device.real_tensor_cores = real;
    ids.insert(TernaryMatMulPlugin(MakeConfig(), "layer").getTimingCacheID());
  }
  CHECK_EQ(ids.size(), 2u);
}

TEST(a_tactic_is_used_in_the_regime_it_was_timed_in) {
  TheState() = State();
  TernaryMatMulPlugin plugin(MakeConfig(), "layer");
  Configure(plugin, 64);
  CHECK_EQ(plugin.setTactic(Id(KernelFamily::kTileDp4a)), 0);
  CHECK_EQ(Run(plugin, 64), 0);
  CHECK(TheState().last.family == KernelFamily::kTileDp4a);  // as timed, though not the default
  CHECK_EQ(Run(plugin, 200), 0);
  CHECK(TheState().last.family == KernelFamily::kTileDp4a);
  CHECK_EQ(Run(plugin, 1), 0);
  CHECK(TheState().last.family == KernelFamily::kGemvDp4a);  // 64 rows say nothing about one
}

TEST(without_an_optimum_the_largest_counts) {
  TheState() = State();
  TernaryMatMulPlugin plugin(MakeConfig(), "layer");
  auto in = Profile(DataType::kHALF, 1, 64);
  for (auto& desc : in) desc.opt = nvinfer1::Dims{};
  nvinfer1::DynamicPluginTensorDesc out{};
  CHECK_EQ(plugin.configurePlugin(in.data(), 4, &out, 1), 0);
  CHECK_EQ(Tactics(plugin).count(Id(KernelFamily::kGemvDp4a)), 0u);
  CHECK_EQ(Tactics(plugin).count(Id(KernelFamily::kTileImma)), 1u);
}

TEST(a_tactic_that_cannot_run_the_rows_gives_way) {
  TheState() = State();
  TernaryMatMulPlugin plugin(MakeConfig(), "layer");
  Configure(plugin, 1);
  CHECK_EQ(plugin.setTactic(Id(KernelFamily::kGemvDp4a)), 0);
  CHECK_EQ(Run(plugin, 100), 0);
  CHECK(TheState().last.family == KernelFamily::kTileImma);
  CHECK_EQ(plugin.setTactic(0), 0);
  CHECK_EQ(Run(plugin, 1), 0);
  CHECK(TheState().last.family == KernelFamily::kGemvDp4a);
}

// TensorRT sets the tactic of a loaded plugin once and then attaches it to each context.
TEST(contexts_inherit_the_tactic) {
  TheState() = State();
  TernaryMatMulPlugin plugin(MakeConfig(), "layer");
  Configure(plugin, 64);
  CHECK_EQ(plugin.setTactic(Id(KernelFamily::kTileDp4a)), 0);
  const std::unique_ptr<nvinfer1::IPluginV3> attached(plugin.attachToContext(nullptr));
  CHECK_EQ(Run(static_cast<TernaryMatMulPlugin&>(*attached), 64), 0);
  CHECK(TheState().last.family == KernelFamily::kTileDp4a);
}

TEST(arguments_are_handed_on) {
  TheState() = State();
  TernaryMatMulPlugin plugin(MakeConfig(), "layer");
  CHECK_EQ(Run(plugin, 5), 0);
  const recording::LaunchRecord& last = TheState().last;
  CHECK(last.args.x == kInputs[0] && last.args.packed_weight == kInputs[1]);
  CHECK(last.args.scale == kInputs[2] && last.args.bias == kInputs[3]);
  CHECK(last.args.y == kOutputs[0] && last.args.workspace == g_memory + 5);
  CHECK(last.stream == reinterpret_cast<cudaStream_t>(g_memory + 6));
  CHECK_EQ(last.args.workspace_bytes, 5000u);
  CHECK(last.type == bitnet::DType::kFloat16);
  CHECK_EQ(last.shape.m, 5);
  CHECK_EQ(last.shape.k, kK);
  CHECK_EQ(last.shape.n, kN);
  CHECK_EQ(last.shape.scale_count, kN);
  CHECK_EQ(Run(plugin, 5, 3, DataType::kFLOAT), 0);
  CHECK(TheState().last.args.bias == nullptr);
  CHECK(TheState().last.type == bitnet::DType::kFloat32);
}

TEST(enqueue_neither_allocates_nor_asks_the_driver) {
  TheState() = State();
  TernaryMatMulPlugin plugin(MakeConfig(), "layer");
  CHECK_EQ(Run(plugin, 3), 0);
  const int queries = TheState().queries;
  g_plugin_allocations = 0;
  for (int i = 0; i < 10; ++i) CHECK_EQ(Run(plugin, 3), 0);
  CHECK_EQ(g_plugin_allocations, 0);
  TheState().launch_status = Status::kLaunchFailed;  // a message is made then, and counted
  CHECK(Run(plugin, 3) != 0);
  CHECK(g_plugin_allocations > 0);
  CHECK_EQ(TheState().queries, queries);
  CHECK_EQ(queries, 1);
}

TEST(a_failed_launch_is_reported) {
  TheState() = State();
  TernaryMatMulPlugin plugin(MakeConfig(), "layer");
  for (const Status status : {Status::kMisaligned, Status::kLaunchFailed, Status::kUnsupported}) {
    TheState().launch_status = status;
    CHECK(Run(plugin, 3) != 0);
  }
}

TEST(without_a_device_plugins_exist_but_do_not_run) {
  TheState() = State();
  TheState().query_status = Status::kLaunchFailed;
  TernaryMatMulPlugin plugin(MakeConfig(), "layer");
  Configure(plugin, 4);
  CHECK_EQ(plugin.getNbTactics(), 0);
  CHECK(plugin.getTimingCacheID() == nullptr);
  CHECK(Run(plugin, 3) != 0);
  CHECK_EQ(TheState().launches, 0);
}

TEST(an_empty_batch_launches_nothing) {
  TheState() = State();
  TernaryMatMulPlugin plugin(MakeConfig(), "layer");
  CHECK_EQ(Run(plugin, 0), 0);
  CHECK_EQ(TheState().launches, 0);
}

TEST(the_timed_rows_travel_with_the_engine) {
  TheState() = State();
  TernaryMatMulPlugin plugin(MakeConfig(), "layer");
  Configure(plugin, 64);
  std::string error;
  const auto loaded = bitnet::trt::ParseFields(plugin.getFieldsToSerialize(),
                                               nvinfer1::TensorRTPhase::kRUNTIME, &error);
  CHECK(loaded.has_value());
  CHECK_EQ(loaded->timed_m, 64);
  TernaryMatMulPlugin other(*loaded, "layer");
  CHECK_EQ(other.setTactic(Id(KernelFamily::kTileDp4a)), 0);
  CHECK_EQ(Run(other, 64), 0);
  CHECK(TheState().last.family == KernelFamily::kTileDp4a);
}

}  // namespace

int main(int argc, char** argv) { return harness::Run(argc > 1 ? argv[1] : ""); }
