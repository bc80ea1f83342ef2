"""The Python on the pages: every block compiles, its names exist and take the arguments it gives;
the pages on fine-tuning, recipes and the functions are run from top to bottom."""

import ast
import importlib
import inspect
import itertools
import re
import textwrap

import pytest

import bitnet_export
from tests.docs.pages import PAGES, ROOT, blocks, is_python

PYTHON = [block for page in PAGES for block in blocks(page) if is_python(block)]
PACKAGE = "bitnet_export"


def test_the_pages_are_read():
    pages = {block.page.name for block in PYTHON}
    assert pages >= {"README.md", "fine-tuning.md", "python.md", "recipes.md", "tensorrt.md"}
    assert len(PYTHON) >= 15


def imported(tree):
    """{name in the block: object} of what it imports from the package; AttributeError or
    ImportError where there is no such thing."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == PACKAGE:
                    module = importlib.import_module(name.name)
                    found[name.asname or PACKAGE] = module if name.asname else bitnet_export
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith(PACKAGE):
            module = importlib.import_module(node.module)
            for name in node.names:
                found[name.asname or name.name] = getattr(module, name.name)
    return found


def resolve(node, names):
    """The object behind ``be.save`` or ``prepare``; None where it is not the package's."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        base = resolve(node.value, names)
        return getattr(base, node.attr) if inspect.ismodule(base) else None
    return None


def check(source):
    tree = ast.parse(source)
    # Pages go on from block to block: what one imported the next may use.
    names = {"be": bitnet_export, PACKAGE: bitnet_export} | imported(tree)
    for node in ast.walk(tree):
        resolve(node, names)
        if isinstance(node, ast.Call) and (called := resolve(node.func, names)) is not None:
            if any(isinstance(a, ast.Starred) for a in node.args):
                continue
            keywords = {k.arg: None for k in node.keywords if k.arg}
            inspect.signature(called).bind(*node.args, **keywords)


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_names_and_arguments_exist(block):
    check(block.text)


@pytest.mark.parametrize(
    "source",
    [
        "import bitnet_export as be\nbe.sav(m)",
        "from bitnet_export.ternary import prepair",
        "be.load_session('d', thread=1)",
        "bitnet_export.save(model)",
    ],
)
def test_a_wrong_name_or_argument_would_be_noticed(source):
    with pytest.raises((AttributeError, ImportError, TypeError)):
        check(source)


def test_the_example_of_the_package_itself():
    example = re.search(r"\n\n((?:    .*\n|\n)+)", bitnet_export.__doc__)[1]
    assert "be.run_export" in example
    check(textwrap.dedent(example))


def test_every_public_name_is_on_the_page():
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    table = page[page.index("## The names") :]
    assert not [name for name in bitnet_export.__all__ if f"`{name}`" not in table]
    for name in bitnet_export.__all__:
        if name != "__version__":
            assert inspect.getdoc(getattr(bitnet_export, name)), name


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """What the pages take for granted: a model, an input of it, data in the working directory."""
    import numpy as np
    import torch
    from torch import nn

    monkeypatch.chdir(tmp_path)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
            self.net = nn.Sequential(*layers)

        def forward(self, x):
            return self.net(x)

    rng = np.random.default_rng(0)
    for name in ("calib", "held-out"):
        np.savez(f"{name}.npz", x=rng.standard_normal((192, 64)).astype(np.float32))
    model = Model().eval()
    x = torch.from_numpy(np.load("held-out.npz")["x"][:4])
    loader = itertools.repeat((x, torch.zeros(4, dtype=torch.int64)), 2)
    return {"model": model, "x": x, "loader": loader, "be": bitnet_export, "torch": torch}


def run(page, names, **replaced):
    """Execute a page's blocks in their order. replaced: text for text, to make a run shorter."""
    for block in PYTHON:
        if block.page == ROOT / page:
            source = block.text
            for old, new in replaced.get("shorter", ()):
                source = source.replace(old, new)
            exec(compile(source, str(block), "exec"), names)
    return names


def test_the_page_of_the_functions_runs(prepared, capsys):
    names = run("docs/python.md", prepared, shorter=[("steps=300", "steps=20")])
    said = capsys.readouterr().out
    assert names["report"].parity
    assert "x smaller" in said
    assert "nowhere holds no manifest.json" in said
    assert names["session"].get_providers()[0] == "CPUExecutionProvider"
    assert names["weights"].is_file()


def test_the_page_on_fine_tuning_runs(prepared, capsys):
    from bitnet_export import TernaryLinear

    shorter = [("steps=300, eval_every=50", "steps=20, eval_every=10"), ("    ...\n", "    pass\n")]
    names = run("docs/fine-tuning.md", prepared, shorter=shorter)
    assert isinstance(names["student"].net[0], TernaryLinear)
    assert names["result"].best["loss"] <= names["result"].evaluations[0]["loss"]
    assert "20 " in capsys.readouterr().out


def test_the_page_on_recipes_runs(prepared):
    prepared |= {"ids": None, "mask": None}
    blocks_of_page = [b for b in PYTHON if b.page == ROOT / "docs/recipes.md"]
    exec(blocks_of_page[0].text, prepared)
    assert prepared["model"].net[0].spec.group_size == 64
    source = blocks_of_page[1].text.replace(
        '{"input_ids": ids, "attention_mask": mask}', '{"x": x.repeat(32, 1)}'
    )
    assert '"x"' in source
    exec(source, prepared)


def test_the_readme_runs(prepared):
    """Its Python, and between it the two commands it shows."""
    from bitnet_export.cli import main

    first, second = (b.text for b in PYTHON if b.page == ROOT / "README.md")
    exec(first, prepared)
    words = "finetune model.pt --data calib.npz --steps 300 -o ternary.pt -q --threads 1"
    main(words.replace("300", "20").split(), standalone_mode=False)
    export = "ternary.pt --target ort --data held-out.npz -q --no-bench --threads 1"
    assert main(export.split(), standalone_mode=False) == 0
    exec(second, prepared)
    assert prepared["y"].shape == (4, 10)
