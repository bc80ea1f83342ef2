"""Predict how long a kernel takes, from bytes and from the instructions of its main loop.

A bound, not a simulation: the time is the largest of reading every byte once at peak bandwidth
and of issuing the main loop's instructions on each of the pipes they need. What is outside the
main loop (quantizing the activations, reductions, launches of 2-3 us) comes on top. Compiling
and disassembling is kernel_report.py's business.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

WARP = 32
CHUNK = 64  # weights of one 16-byte load
TILE_N = 64
MAX_SPLITS = 8  # as in plugins/kernels/params.h
MIN_CHUNKS_PER_SPLIT = 8


@dataclass(frozen=True)
class Card:
    """A Turing card. bandwidth in GB/s, clock (boost) in GHz, from NVIDIA's data sheets."""

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float
    tensor_cores: bool


CARDS = (
    Card("GTX 1660", 22, 1.785, 192, False),
    Card("T4", 40, 1.59, 320, True),
    Card("RTX 2080 Ti", 68, 1.545, 616, True),
)

# Clocks one multiprocessor (four schedulers) is busy with one warp instruction, by pipe. Turing
# issues one instruction a scheduler and clock; its 64 ALU, 64 FMA and 64 dp4a lanes take two
# clocks a warp and scheduler. A 16-byte shared load moves 512 bytes at 128 bytes a clock.
ISSUE_CLOCKS = 1 / 4
PIPE_CLOCKS: tuple[tuple[str, str, float], ...] = (
    # pipe, pattern of SASS mnemonics, clocks
    ("dp4a", r"IDP\.", 1 / 2),
    ("tensor int8", r"IMMA\.8816", 1.0),
    ("tensor fp16", r"HMMA\.1688", 2.0),
    ("fma", r"(FFMA|FMUL|FADD|IMAD)", 1 / 2),
    ("alu", r"(LOP3|SHF|IADD3|ISETP|PLOP3|LEA|IMNMX|MOV|SEL|PRMT|FSETP|FMNMX)", 1 / 2),
    ("fp16", r"(HFMA2|HADD2|HMUL2)", 1 / 2),
    ("shared", r"LDS\.U?\.?128", 4.0),
    ("shared", r"(LDS|STS)", 1.0),
    ("conversion", r"(I2F|F2I|FRND|MUFU)", 2.0),
)


@dataclass(frozen=True)
class Tiling:
    """How a kernel covers the output. columns: rows of x in one pass; k_step, n_step, warps: what
    one turn of a block's main loop multiplies, and with how many warps."""

    family: str
    columns: int
    k_step: int
    n_step: int
    warps: int

    @property
    def macs_per_turn(self) -> float:
        """Multiplications of one warp's turn of the loop, padding included."""
        return self.columns * self.k_step * self.n_step / self.warps


# A GEMV warp: eight lanes a row, one chunk each; four rows side by side, two in registers.
TILINGS: Mapping[str, Tiling] = {
    **{f"GemvDp4aKernel<fp16,{c},0>": Tiling("gemv_dp4a", c, 512, 8, 1) for c in (1, 2, 4, 8)},
    **{f"GemvFloatKernel<fp16,{c},0>": Tiling("gemv_float", c, 512, 8, 1) for c in (1, 2, 4)},
    "TileImmaKernel<fp16,16,1,4,0>": Tiling("tile_imma", 16, 256, TILE_N, 4),
    "TileImmaKernel<fp16,64,2,2,0>": Tiling("tile_imma", 64, 128, TILE_N, 4),
    "TileDp4aKernel<fp16,128,16,2,4,0>": Tiling("tile_dp4a", 16, 64, TILE_N, 4),
    "TileDp4aKernel<fp16,256,64,4,4,0>": Tiling("tile_dp4a", 64, 64, TILE_N, 8),
    "TileFloatKernel<fp16,2,0>": Tiling("tile_float", 16, 64, TILE_N, 4),
    "TileFloatKernel<fp16,4,0>": Tiling("tile_float", 32, 64, TILE_N, 4),
    "TileHmmaKernel<16,1,2,0>": Tiling("tile_hmma", 16, 128, TILE_N, 4),
    "TileHmmaKernel<64,2,1,0>": Tiling("tile_hmma", 64, 64, TILE_N, 4),
}


@dataclass(frozen=True)
class Prediction:
    """microseconds: the bound. limit: what sets it, "memory" or a pipe."""

    kernel: str
    microseconds: float
    limit: str


def ceil_to(value: int, multiple: int) -> int:
    """value rounded up to a multiple."""
    return -(-value // multiple) * multiple


def pipe_clocks(mix: Mapping[str, int]) -> dict[str, float]:
    """Instruction counts of one turn of a loop -> clocks of one multiprocessor on each pipe."""
    clocks = {"issue": sum(mix.values()) * ISSUE_CLOCKS}
    for mnemonic, count in mix.items():
        for pipe, pattern, cost in PIPE_CLOCKS:
            if re.match(pattern, mnemonic):
                clocks[pipe] = clocks.get(pipe, 0.0) + count * cost
                break
    return clocks


def traffic_bytes(m: int, k: int, n: int, passes: int = 1) -> int:
    """Bytes through memory: packed weights (once a pass), fp16 x and y, one scale an output."""
    return passes * n * ceil_to(k, CHUNK) // 4 + 2 * m * (k + n) + 4 * n


def busy_multiprocessors(tiling: Tiling, m: int, k: int, n: int, card: Card) -> int:
    """How many multiprocessors have a block at all: tiles may be few, even split along K."""
    if tiling.family.startswith("gemv"):
        return card.multiprocessors
    blocks = -(-n // TILE_N) * -(-m // tiling.columns)
    splits = min(MAX_SPLITS, 4 * card.multiprocessors // blocks)
    splits = min(splits, ceil_to(k, CHUNK) // CHUNK // MIN_CHUNKS_PER_SPLIT) if m <= 64 else 1
    return min(card.multiprocessors, blocks * max(1, splits))


def predict(kernel: str, mix: Mapping[str, int], m: int, k: int, n: int, card: Card) -> Prediction:
    """The bound for one kernel of TILINGS on one shape. mix: its main loop's instructions."""
    tiling = TILINGS[kernel]
    passes = -(-m // tiling.columns) if tiling.family.startswith("gemv") else 1
    times = {"memory": traffic_bytes(m, k, n, passes) / card.bandwidth / 1e3}
    macs = ceil_to(k, tiling.k_step) * ceil_to(n, tiling.n_step) * ceil_to(m, tiling.columns)
    turns = macs / tiling.macs_per_turn / busy_multiprocessors(tiling, m, k, n, card)
    for pipe, clocks in pipe_clocks(mix).items():
        times[pipe] = turns * clocks / card.clock / 1e3
    limit = max(times, key=lambda name: times[name])
    return Prediction(kernel, times[limit], limit)


def candidates(m: int, card: Card, bits: int) -> list[str]:
    """The kernels that could run m rows on the card, for int8 (8) or float (0) activations."""
    families = {8: ("gemv_dp4a", "tile_dp4a", "tile_imma"), 0: ("gemv_float", "tile_float")}[bits]
    if bits == 0:
        families = (*families, "tile_hmma")
    found = []
    for name, tiling in TILINGS.items():
        if tiling.family not in families:
            continue
        if tiling.family in ("tile_imma", "tile_hmma") and not card.tensor_cores:
            continue
        if tiling.family.startswith("gemv"):
            widths = [t.columns for t in TILINGS.values() if t.family == tiling.family]
            fits = [w for w in widths if w >= m] or [max(widths)]
            if m > 8 or tiling.columns != min(fits):
                continue
        elif (tiling.columns == 16) != (m <= 16):
            continue
        found.append(name)
    return found
