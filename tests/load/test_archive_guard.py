"""A program file that would run code when torch reads it is refused before torch reads it."""

import io
import json
import pickle
import zipfile

import pytest
import torch

from bitnet_export.errors import InputError
from bitnet_export.load import load
from bitnet_export.load.archive_guard import _is_arithmetic, _is_known_target


class Evil:
    def __reduce__(self):
        return print, ("this must never be printed",)


def rewrite(source, target, change):
    """Copy a zip with change(name, data) applied to each member; None drops it."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for item in old.infolist():
            data = change(item.filename, old.read(item))
            if data is not None:
                new.writestr(item, data)
    return target


def edit_json(suffix, edit):
    def change(name, data):
        if not name.endswith(suffix):
            return data
        tree = json.loads(data)
        edit(tree)
        return json.dumps(tree).encode()

    return change


def first_call(tree):
    return tree["graph_module"]["graph"]["nodes"][0]


def pickled_inputs(name, data):
    if "sample_inputs" not in name:
        return data
    buffer = io.BytesIO()
    torch.save(((Evil(),), {}), buffer)
    return buffer.getvalue()


def pickled_weight(name, data):
    if name.endswith("weight_0"):
        return pickle.dumps(Evil())
    return edit_json(
        "model_weights_config.json",
        lambda tree: next(iter(tree["config"].values())).update(use_pickle=True),
    )(name, data)


EVIL = {
    "inputs": (pickled_inputs, "more than tensors"),
    "weight": (pickled_weight, "more than tensors"),
    "target": (
        edit_json("model.json", lambda t: first_call(t).update(target="torch.os.system")),
        "its graph calls",
    ),
    "load_library": (
        edit_json("model.json", lambda t: first_call(t).update(target="torch.ops.load_library")),
        "its graph calls",
    ),
    "expression": (
        edit_json(
            "model.json",
            lambda t: t["graph_module"].update(x={"expr_str": "__import__('os').getcwd()"}),
        ),
        "symbolic size",
    ),
}


@pytest.mark.parametrize("kind", EVIL)
def test_code_is_refused(files, tmp_path, capfd, kind):
    change, message = EVIL[kind]
    path = rewrite(files / "tied.pt", tmp_path / "evil.pt2", change)
    with pytest.raises(InputError, match=message) as refusal:
        load(path)
    assert "--trust-pickle" in str(refusal.value)
    assert "must never" not in capfd.readouterr().out


def test_compiled_code_is_refused(files, tmp_path):
    path = tmp_path / "aot.pt2"
    path.write_bytes((files / "mlp.pt2").read_bytes())
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].split("/")[0]
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{root}/data/aotinductor/model/model.so", b"\x7fELF")
    with pytest.raises(InputError, match="compiled code"):
        load(path)


def test_damaged_member(files, tmp_path):
    data = bytearray((files / "mlp.pt2").read_bytes())
    with zipfile.ZipFile(files / "mlp.pt2") as archive:
        member = next(i for i in archive.infolist() if i.filename.endswith("model.json"))
    data[member.header_offset + 300] ^= 0xFF  # the checksum no longer fits
    (tmp_path / "bad.pt2").write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        load(tmp_path / "bad.pt2")


@pytest.mark.parametrize(
    ("expression", "good"),
    [
        ("Symbol('s53', positive=True, integer=True)", True),
        ("Mul(Integer(16), Symbol('s53', positive=True, integer=True))", True),
        ("2*s0 + 1", True),
        ("floor(s0/2)", True),
        ("__import__('os').system('true')", False),
        ("eval('1')", False),
        ("Symbol.__class__", False),
        ("[x for x in (1,)]", False),
        ("Symbol('__import__(1)')", False),
        ("lambda: 1", False),
        ("s0 +", False),
    ],
)
def test_expressions(expression, good):
    assert _is_arithmetic(expression) is good


@pytest.mark.parametrize(
    ("target", "good"),
    [
        ("torch.ops.aten.linear.default", True),
        ("torch.ops.aten.__and__.Tensor", True),
        ("torch.ops.bitnet.ternary_matmul.default", True),
        ("torch.ops.higher_order.wrap_with_set_grad_enabled", True),
        ("_operator.add", True),
        ("torch.sym_max", True),
        ("math.ceil", True),
        ("_operator.methodcaller", False),
        ("_operator.call", False),
        ("torch.ops.load_library", False),
        ("torch.ops.aten.__class__.__init__", False),
        ("torch.ops.aten.from_file.default", False),
        ("torch.load", False),
        ("torch.hub.load", False),
        ("math.__loader__", False),
        ("os.system", False),
    ],
)
def test_targets(target, good):
    assert _is_known_target(target) is good
