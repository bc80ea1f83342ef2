"""GGUF files: TQ1_0 and TQ2_0 trits arrive as the gguf package itself unpacks them, bit for bit;
damaged files are refused before anything reads past their end."""

import struct

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")

from bitnet_export.errors import InputError  # noqa: E402
from bitnet_export.load import detect, load  # noqa: E402
from bitnet_export.load.gguf_header import read_header  # noqa: E402
from bitnet_export.ternary import TernaryConfig, prepare  # noqa: E402
from tests.load import gguf_files  # noqa: E402
from tests.load.gguf_files import HEADS, KV_HEADS, LAYERS, PATHS, write_llama  # noqa: E402


def stored_order(name, weight):
    """Query and key rows as llama.cpp stores them: each head's two halves interleaved."""
    heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name)
    if heads is None:
        return weight
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
@pytest.mark.parametrize("scales", ["tensor", "row", "block"])
def test_trits_and_scales_are_the_files_own(tmp_path, kind, scales):
    expected = write_llama(tmp_path / "m.gguf", kind, scales=scales)
    assert detect(tmp_path / "m.gguf") == "gguf"
    loaded = load(tmp_path / "m.gguf")
    assert (loaded.kind, loaded.name, loaded.output_names) == ("gguf", "m", ["logits"])
    assert loaded.axis_limits == {"sequence": 64}
    rows = prepare(loaded.module, TernaryConfig(exclude=tuple(loaded.float_layers)))
    assert sum(row.status == "ternary" for row in rows) == 7 * LAYERS
    granularities = set()
    for layer in range(LAYERS):
        for name, path in PATHS.items():
            module = loaded.module.get_submodule(f"model.model.layers.{layer}.{path}")
            trits, scale = module.ternarize()
            granularities.add((module.spec.granularity, module.spec.group_size))
            weight = expected[f"blk.{layer}.{name}.weight"]
            found = (trits.reshape(*trits.shape[:1], -1) * _per_weight(scale, trits)).numpy()
            assert np.array_equal(stored_order(name, found), weight), name
            assert np.array_equal(stored_order(name, trits.numpy()), np.sign(weight)), name
    # One block of 256 is a whole row of the layers with K = 256.
    assert (
        granularities
        == {
            "tensor": {("tensor", 0)},
            "row": {("channel", 0)},
            "block": {("channel", 0), ("group", 128)},
        }[scales]
    )


def _per_weight(scale, trits):
    if scale.dim() == 2:
        return scale.repeat_interleave(trits.shape[1] // scale.shape[1], dim=1)
    return scale[:, None]


def test_it_computes_what_transformers_computes(tmp_path):
    import transformers

    write_llama(tmp_path / "m.gguf", "TQ2_0", scales="block")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    loaded = load(tmp_path / "m.gguf")
    with torch.no_grad():
        expected = theirs(**loaded.example_inputs).logits
        torch.testing.assert_close(loaded.module(**loaded.example_inputs), expected)


def test_layers_that_are_floats_in_the_file_stay_floats(tmp_path):
    expected = write_llama(tmp_path / "m.gguf", "TQ1_0", dense=("blk.1.ffn_up",))
    loaded = load(tmp_path / "m.gguf")
    up = "model.model.layers.1.mlp.up_proj"
    assert loaded.float_layers == [up, "model.lm_head"]
    assert "13 TQ1_0" in loaded.notes[0]
    weight = loaded.module.get_submodule(up).weight
    assert np.array_equal(weight.detach().numpy(), expected["blk.1.ffn_up.weight"])


def test_an_ordinary_gguf_is_a_full_precision_model(tmp_path):
    write_llama(tmp_path / "m.gguf", "Q8_0")
    loaded = load(tmp_path / "m.gguf")
    assert loaded.float_layers == []
    assert sum(row.status == "ternary" for row in prepare(loaded.module)) == 7 * LAYERS


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_llama(path)
    return path.read_bytes()


@pytest.mark.parametrize("kept", [4, 7, 23, 40, 300, 1500, 0.3, 0.999])
def test_truncated_at_any_place(whole, tmp_path, kept):
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(len(whole) * kept)])
    with pytest.raises(InputError, match="truncated or damaged"):
        load(path)


def test_every_prefix_of_the_header_is_refused(whole, tmp_path):
    path = tmp_path / "cut.gguf"
    for length in range(4, 4000, 61):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="truncated or damaged"):
            read_header(path)


@pytest.mark.parametrize(
    ("offset", "kind", "value", "message"),
    [
        (4, "I", 9, "version 9"),
        (4, "I", 0x03000000, "little-endian"),
        (8, "Q", 2**40, "promises"),
        (16, "Q", 2**63, "promises"),
        (24, "Q", 2**62, "ends early"),  # the length of the first key
    ],
)
def test_damaged_counts(whole, tmp_path, offset, kind, value, message):
    data = bytearray(whole)
    struct.pack_into(f"<{kind}", data, offset, value)
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(InputError, match=message):
        load(tmp_path / "m.gguf")


def test_random_damage_to_the_header_never_escapes(whole, tmp_path):
    """Any flipped byte is refused or gives a header; nothing else is raised and nothing hangs."""
    path = tmp_path / "m.gguf"
    rng = np.random.default_rng(0)
    for position in rng.integers(4, 3000, 300):
        data = bytearray(whole)
        data[position] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        try:
            header = read_header(path)
        except InputError:
            continue
        assert len(header.tensors) == 3 + 9 * LAYERS


def test_unknown_tensor_type_split_file_and_architecture(tmp_path):
    path = tmp_path / "m.gguf"
    write_llama(path)
    data = path.read_bytes()
    name = b"blk.0.attn_q.weight"
    at = data.index(name) + len(name) + 4 + 16
    (tmp_path / "type.gguf").write_bytes(data[:at] + struct.pack("<I", 36) + data[at + 4 :])
    with pytest.raises(InputError, match=r"attn_q\.weight has type 36.*\n.*i2_s"):
        load(tmp_path / "type.gguf")
    write_llama(path, architecture="bitnet")
    with pytest.raises(InputError, match=r"architecture is bitnet.*llama.*from GGUF"):
        load(path)
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputError, match="llama-gguf-split --merge"):
        load(tmp_path / "part.gguf")
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "llama")
    writer.add_string("split.count", "two")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputError, match="makes no sense"):
        load(tmp_path / "odd.gguf")


def test_missing_tensor(tmp_path, monkeypatch):
    shapes = {k: v for k, v in gguf_files.SHAPES.items() if k != "ffn_down"}
    monkeypatch.setattr(gguf_files, "SHAPES", shapes)
    write_llama(tmp_path / "m.gguf")
    with pytest.raises(InputError, match=r"2 weights are missing.*down_proj"):
        load(tmp_path / "m.gguf")
