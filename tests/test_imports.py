"""Imports flow one way, and the command line starts without anything heavy.

Read from the sources with ast, imports inside functions included; those for type checkers are not
imports. What a module imports may stand earlier in the line, never later.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bitnet_export

PACKAGE = Path(bitnet_export.__file__).parent

# Each row may import the rows above it, and its own. A name is a module or a package with all
# its modules. The order is docs' "data flows one way", with what serves all stages on top.
LINE = (
    {"errors"},
    {"packing", "env", "options", "axes"},
    {"op"},
    {"onnx_tensors"},
    {"onnx_io", "manifest", "native"},
    {"compress"},
    {"output_dir"},
    {"load"},
    {"ternary"},
    {"checkpoints"},
    {"export", "export_attention", "export_tensors"},
    {"passes"},
    {"targets"},
    {"verify"},
    {"report"},
    {"shapes", "history", "post_training", "stages", "subject"},
    {"assess", "opening", "reopened"},
    {"finetune_run", "convert_run"},
    {"export_run"},
    {"pipeline"},
    {"cli"},
    {"__main__"},
)
# bitnet_export itself only hands out names of the others, on first use.
FACADE = "__init__"
HEAVY = {
    *("torch", "onnx", "onnxruntime", "onnx_graphsurgeon", "onnxscript", "transformers"),
    *("polygraphy", "tensorrt", "matplotlib", "sklearn", "scipy", "tokenizers"),
}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def part_of(path):
    """bitnet_export/passes/base.py -> "passes"; bitnet_export/op.py -> "op"."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(node, *, functions=True):
    """(dotted name, line) of every import under node, those for type checkers left out."""
    children = list(ast.iter_child_nodes(node))
    if is_type_checking(node):
        children = node.orelse
    for child in children:
        if isinstance(child, ast.Import):
            yield from ((name.name, child.lineno) for name in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"relative import in line {child.lineno}"
            yield from ((f"{child.module}.{name.name}", child.lineno) for name in child.names)
        elif functions or not isinstance(
            child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
        ):
            yield from imports(child, functions=functions)


def own_part(name):
    """bitnet_export.passes.base.Pass -> "passes"; another package -> ""."""
    parts = name.split(".")
    return parts[1] if parts[0] == "bitnet_export" and len(parts) > 1 else ""


def level(part):
    return next(i for i, row in enumerate(LINE) if part in row)


def test_every_module_has_its_place():
    known = set().union(*LINE) | {FACADE}
    assert {part_of(path) for path in SOURCES if path.suffix == ".py"} - {"_native"} == known


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_flow_one_way(path):
    part = part_of(path)
    if part == FACADE:
        return
    wrong = [
        f"line {line}: {part} imports {name}, which stands later"
        for name, line in imports(ast.parse(path.read_text()))
        if own_part(name) and level(own_part(name)) > level(part)
    ]
    assert not wrong, wrong


def test_the_walk_sees_what_it_should():
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from bitnet_export import pipeline
else:
    import one
def f():
    from bitnet_export.cli import main
class C:
    import two
    def g(self):
        try:
            import three.four
        except ImportError:
            pass
"""
    tree = ast.parse(source)
    assert [n for n, _ in imports(tree)] == [
        *("typing.TYPE_CHECKING", "one", "bitnet_export.cli.main", "two", "three.four"),
    ]
    assert [n for n, _ in imports(tree, functions=False)] == ["typing.TYPE_CHECKING", "one", "two"]
    assert own_part("bitnet_export.cli.main") == "cli"
    assert level("cli") > level("passes") > level("op")


def modules_loaded_by(code):
    script = f"{code}\nimport sys\nprint(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import bitnet_export",
        "import bitnet_export.cli",
        "import bitnet_export.options, bitnet_export.errors",
    ],
)
def test_starting_loads_nothing_heavy(code):
    assert not modules_loaded_by(code) & HEAVY


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_every_file_says_what_lives_there(path):
    tree = ast.parse(path.read_text())
    assert not tree.body or ast.get_docstring(tree)
