"""Back ends: each lowers a model of TernaryMatMuls to what its runtime runs, and runs it."""

from bitnet_export.targets.base import BuildJob, Decision, Lowered, Target, target_for
from bitnet_export.targets.session import Session, load_session, open_session

__all__ = [
    "BuildJob",
    "Decision",
    "Lowered",
    "Session",
    "Target",
    "load_session",
    "open_session",
    "target_for",
]
