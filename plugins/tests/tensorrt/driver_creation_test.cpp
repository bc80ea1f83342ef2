// The library's entry points and the creator: which fields make a plugin and which are refused.

#include "harness.h"
#include "player.h"

namespace {

using fakes::FieldList;
using fakes::ParserFields;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::TensorRTPhase;
using player::Create;
using player::Plugin;
using player::TheLibrary;

TEST(library_offers_one_v3_creator) {
  player::Library& library = TheLibrary();
  CHECK_EQ(library.creator_count, 1);
  CHECK_EQ(std::string(library.creators[0]->getInterfaceInfo().kind), "PLUGIN CREATOR_V3ONE");
  CHECK_EQ(std::string(library.creator->getPluginName()), "TernaryMatMul");
  CHECK_EQ(std::string(library.creator->getPluginVersion()), "1");
  CHECK_EQ(std::string(library.creator->getPluginNamespace()), "");
}

// The ONNX parser passes on exactly these attributes of a node.
TEST(creator_names_the_attributes) {
  const auto* names = TheLibrary().creator->getFieldNames();
  std::string list;
  for (int32_t i = 0; i < names->nbFields; ++i) list += std::string(names->fields[i].name) + " ";
  CHECK_EQ(list, "K N group_size activation_bits ");
}

TEST(plugin_has_all_capabilities) {
  Plugin plugin = Create(ParserFields(64, 8));
  CHECK(plugin);
  CHECK_EQ(std::string(plugin.core->getInterfaceInfo().kind), "PLUGIN_V3ONE_CORE");
  CHECK_EQ(std::string(plugin.build->getInterfaceInfo().kind), "PLUGIN_V3ONE_BUILD");
  CHECK_EQ(std::string(plugin.runtime->getInterfaceInfo().kind), "PLUGIN_V3ONE_RUNTIME");
  CHECK_EQ(std::string(plugin.core->getPluginName()), "TernaryMatMul");
  CHECK_EQ(plugin.build->getNbOutputs(), 1);
  CHECK_EQ(std::string(plugin.build->getMetadataString()),
           "K=64 N=8 group_size=0 activation_bits=8");
}

TEST(int64_fields_and_selectors_are_accepted) {
  FieldList fields;
  fields.add("K", 64, true).add("N", 8, true).add("group_size", 32, true);
  fields.add_text("plugin_version", "1").add_text("plugin_namespace", "");
  CHECK(Create(std::move(fields)));
}

TEST(optional_fields_default_as_in_the_onnx_schema) {
  FieldList fields;
  fields.add("K", 64).add("N", 8);
  Plugin plugin = Create(std::move(fields));
  CHECK(plugin);
  CHECK_EQ(std::string(plugin.build->getMetadataString()),
           "K=64 N=8 group_size=0 activation_bits=8");
}

void CheckRefused(FieldList fields, const char* says,
                  TensorRTPhase phase = TensorRTPhase::kBUILD) {
  fakes::FakeLogger& logger = TheLibrary().logger;
  logger.messages.clear();
  logger.severities.clear();
  CHECK(!Create(std::move(fields), phase));
  CHECK_EQ(logger.messages.size(), 1u);
  CHECK_SAYS(logger.last(), says);
  CHECK_SAYS(logger.last(), "TernaryMatMul 'layer'");
  CHECK(logger.severities.back() == nvinfer1::ILogger::Severity::kERROR);
}

FieldList WithRaw(const PluginField& field) {
  FieldList fields;
  fields.add("N", 8).add_raw(field);
  return fields;
}

TEST(missing_and_unknown_fields_are_refused) {
  CheckRefused(FieldList().add("N", 8), "field K is missing");
  CheckRefused(FieldList().add("K", 64), "field N is missing");
  CheckRefused(FieldList(), "field K is missing");
  CheckRefused(ParserFields(64, 8).add("bits", 2), "unknown field bits");
  CheckRefused(ParserFields(64, 8).add("K", 64), "field K is given twice");
  CheckRefused(ParserFields(64, 8).add("timed_m", 1), "unknown field timed_m");
  CheckRefused(WithRaw({nullptr, nullptr, PluginFieldType::kINT32, 1}), "has no name");
}

TEST(fields_of_wrong_type_or_length_are_refused) {
  const float real = 64.0f;
  const int32_t pair[] = {64, 64};
  CheckRefused(WithRaw({"K", &real, PluginFieldType::kFLOAT32, 1}), "K must be an INT32 or INT64");
  CheckRefused(WithRaw({"K", "64", PluginFieldType::kCHAR, 2}), "K must be an INT32 or INT64");
  CheckRefused(WithRaw({"K", pair, PluginFieldType::kINT32, 2}), "K must hold one value, got 2");
  CheckRefused(WithRaw({"K", nullptr, PluginFieldType::kINT32, 1}), "K must hold one value");
  CheckRefused(FieldList().add("K", int64_t{1} << 33, true).add("N", 8), "does not fit 32 bits");
  CheckRefused(ParserFields(64, 8).add("plugin_version", 1), "plugin_version must be a string");
  CheckRefused(ParserFields(64, 8).add_text("plugin_version", "2"),
               "plugin_version is '2', this plugin is '1'");
}

TEST(values_outside_the_op_are_refused) {
  CheckRefused(ParserFields(0, 8), "K=0");
  CheckRefused(ParserFields(64, 0), "N=0");
  CheckRefused(ParserFields(-64, 8), "K=-64");
  CheckRefused(ParserFields(64, 8, 48), "group_size=48");
  CheckRefused(ParserFields(64, 8, -1), "group_size=-1");
  CheckRefused(ParserFields(64, 8, 0, 4), "activation_bits=4");
  CheckRefused(ParserFields((1 << 18) + 1, 8), "K must be 1..262144");
  CheckRefused(ParserFields(1 << 18, 1 << 30, 1), "is not allowed");
}

TEST(no_collection_is_refused) {
  CHECK(TheLibrary().creator->createPlugin("layer", nullptr, TensorRTPhase::kBUILD) == nullptr);
  CHECK_SAYS(TheLibrary().logger.last(), "no fields given");
  const nvinfer1::PluginFieldCollection broken{2, nullptr};
  CHECK(TheLibrary().creator->createPlugin(nullptr, &broken, TensorRTPhase::kBUILD) == nullptr);
}

TEST(an_engine_of_another_serialization_is_refused) {
  Plugin plugin = Create(ParserFields(64, 8));
  const player::Stored stored(plugin, 0);
  CHECK(Create(stored.list(), TensorRTPhase::kRUNTIME));
  FieldList newer;
  for (const auto& [name, value] : stored.fields) {
    newer.add(name, name == "serialization_version" ? value + 1 : value);
  }
  CheckRefused(std::move(newer), "build the engine again", TensorRTPhase::kRUNTIME);
  CheckRefused(ParserFields(64, 8), "field timed_m is missing", TensorRTPhase::kRUNTIME);
}

}  // namespace
