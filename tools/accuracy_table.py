"""Measure a row of the table in docs/accuracy.md: one command a row.

    python tools/accuracy_table.py sentiment            # or embedder, gpt, smollm2
    python tools/accuracy_table.py gpt --seeds 3 --alternatives --write
    python tools/accuracy_table.py pretrain             # only train the GPT of the gpt row
    python tools/accuracy_table.py summary --write      # one table of the results there are

Full-precision models are trained on first use and kept under build/accuracy. Everything else is
the product's own fine-tuning with its defaults, its export for ONNX Runtime, and the metric of the
exported file. Results go to docs/benchmarks/accuracy-ROW.json and, with --write, into the page.
Digits have a command of their own: tools/digits_table.py.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path

import torch
from accuracy import measure, pretrain, texts
from accuracy.rows import BUILD, BY_HAND, ROWS

REPOSITORY = Path(__file__).resolve().parents[1]
DOC = REPOSITORY / "docs" / "accuracy.md"
RESULTS = REPOSITORY / "docs" / "benchmarks"


def write(row: str, text: str, doc: Path = DOC) -> None:
    """Replace what is between the row's markers in doc."""
    begin, end = f"<!-- {row}:begin -->", f"<!-- {row}:end -->"
    page = doc.read_text("utf-8")
    if begin not in page or end not in page:
        raise SystemExit(f"{doc} has no {begin} ... {end} to write between")
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    doc.write_text(pattern.sub(lambda _: f"{begin}\n{text}\n{end}", page), "utf-8")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    made.add_argument("row", choices=[*ROWS, "pretrain", "summary"])
    made.add_argument("--seeds", type=int, default=1)
    made.add_argument("--steps", type=int, help="fine-tuning steps; default: the recipe's")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument(
        "--alternatives",
        nargs="*",
        metavar="NAME",
        choices=BY_HAND,
        help=f"also the recipes set by hand: all, or some of {', '.join(map(repr, BY_HAND))}",
    )
    made.add_argument("--only-int8", action="store_true", help="leave float activations out")
    made.add_argument("--no-calibration", action="store_true", help="leave that form out")
    made.add_argument("--resume", action="store_true", help="keep the forms the JSON has")
    made.add_argument("--work", type=Path, default=BUILD, help="where models are kept")
    made.add_argument("--results", type=Path, default=RESULTS, help="where the JSON goes")
    made.add_argument("--write", action="store_true", help="update docs/accuracy.md")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 1 if the row misses its limit."""
    options = parser().parse_args(arguments)
    given = arguments if arguments is not None else sys.argv[1:]
    torch.set_num_threads(options.threads)
    if options.row == "pretrain":
        training = pretrain.Training(steps=options.steps or pretrain.Training.steps)
        pretrain.pretrain(options.work / "gpt", pretrain.Shape(), training, texts.reviews)
        return 0
    if options.row == "summary":
        files = {row.name: options.results / f"accuracy-{row.name}.json" for row in ROWS.values()}
        there = [(ROWS[n], measure.Record.read(f)) for n, f in files.items() if f.exists()]
        return _show("summary", measure.summary(there), options.write)
    row = ROWS[options.row]
    alternatives = (
        tuple(BY_HAND) if options.alternatives == [] else tuple(options.alternatives or ())
    )
    plan = measure.Plan(
        options.work,
        options.threads,
        options.seeds,
        options.steps,
        alternatives,
        not options.only_int8,
        not options.no_calibration,
    )
    path = options.results / f"accuracy-{row.name}.json"
    command = shlex.join(["python", "tools/accuracy_table.py", *given])
    earlier = measure.Record.read(path) if options.resume and path.exists() else None
    record = measure.measure(row, plan, command, lambda r: r.write(path), earlier)
    _show(row.name, measure.table(row, record), options.write)
    return int(not measure.reached(row, record))


def _show(name: str, text: str, page: bool) -> int:
    print(text)
    if page:
        write(name, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
