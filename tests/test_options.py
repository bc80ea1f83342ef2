"""What a Python caller may leave to the options: text for paths, one for several."""

from pathlib import Path

import pytest

from bitnet_export import options


@pytest.mark.parametrize(
    "kind", [options.ExportOptions, options.FinetuneOptions, options.ConvertOptions]
)
def test_text_is_a_path(kind):
    made = kind("some/model.pt", data="d.npz", output="out")
    assert made.model == Path("some/model.pt")
    assert (made.data, made.output) == (Path("d.npz"), Path("out"))
    assert kind(Path("m.pt")).data is None


def test_one_alone_or_a_list_where_several_are_taken():
    made = options.ExportOptions("m.pt", input_specs="x:batchx64", opt_shapes=["x:1x64"])
    assert (made.input_specs, made.opt_shapes) == (("x:batchx64",), ("x:1x64",))
    assert options.BenchOptions("d", shapes="batch=1", threads=2).threads == (2,)
    assert options.BenchOptions("d", threads=(1, 2)).threads == (1, 2)
    assert options.TernaryOptions(exclude="*.head").exclude == ("*.head",)
    assert options.TernaryOptions().exclude is None
    assert options.VerifyOptions("d", reference="m.pt").reference == Path("m.pt")


def test_defaults_follow_from_the_model():
    assert options.ExportOptions("dir/m.pt").directory == Path("out/m-ort")
    assert options.FinetuneOptions("dir/m.pt").file == Path("m-ternary.pt")
    assert options.ConvertOptions("m.pt", to="hf-bitnet").path == Path("m-hf-bitnet")
