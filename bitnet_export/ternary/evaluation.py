"""The held-out loss: the same lesson on samples that are not trained on."""

from __future__ import annotations

import torch

from bitnet_export.ternary.data import Batches
from bitnet_export.ternary.objective import Lesson, Teacher
from bitnet_export.ternary.parallel import Group

# The teacher's held-out answers are the same at every evaluation: keep them, up to this much.
CACHE_MB = 256


class HeldOut:
    """Held-out batches and the teacher's answers to them."""

    def __init__(self, batches: Batches, teacher: Teacher, lesson: Lesson, group: Group) -> None:
        self.batches, self.teacher, self.lesson, self.group = batches, teacher, lesson, group

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and agreement (top-1 for logits, cosine otherwise), means over samples.

        Every process takes every size-th batch. All of them make the same number of calls, as
        sharded models need: those that have run out of batches answer one that does not count.
        """
        order, group = self.batches.in_order(), self.group
        totals = torch.zeros(3, dtype=torch.float32, device=self.batches.device)
        for first in range(0, len(order), group.size):
            at = first + group.rank
            counts = at < len(order)
            at = at if counts else 0
            batch = self.batches.collate(order[at])
            taught = self.teacher.answer(batch, ("held out", at))
            terms, agreement = self.lesson(batch, taught, shared=False)
            if counts:
                loss = torch.stack(list(terms.values())).sum()
                row = torch.stack([loss, agreement, torch.ones_like(loss)])
                totals += row.float() * len(order[at])
        loss, agreed, count = group.total(totals).tolist()
        return {"loss": loss / count, "agreement": agreed / count}
