"""Several processes, one fine-tuning run: who has which samples, and how gradients meet.

Group says who there is and shares numbers; it is a group of one without torch.distributed.
Engine wraps the lesson: as it is, in DistributedDataParallel ("ddp": every process holds the
whole models) or sharded with FSDP2 ("fsdp": each holds a part of every parameter). Starting
processes is torchrun's or accelerate's; what is trained is distill.py's.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bitnet_export.errors import MissingRequirement, UsageError
from bitnet_export.ternary import observe


class Group:
    """The processes that share a run: ``rank`` of ``size``; rank 0 writes and speaks."""

    def __init__(self) -> None:
        there = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if there else 0
        self.size = dist.get_world_size() if there else 1

    @property
    def leads(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def parts(self, indices: Tensor, accumulate: int) -> list[Tensor]:
        """This process's samples of a batch, in as many parts as are worked off one by one.

        Raises UsageError where the batch does not divide evenly.
        """
        shares = self.size * accumulate
        if len(indices) % shares:
            raise UsageError(
                f"a batch of {len(indices)} cannot be shared by {self.size} processes in"
                f" {accumulate} parts each",
                where="finetune",
                fix=f"choose a batch size that is a multiple of {shares}",
            )
        # Every size-th sample: batches are sorted by length, and nobody should get the long ones.
        return list(indices[self.rank :: self.size].chunk(accumulate))

    def total(self, values: Tensor) -> Tensor:
        """The sum of everybody's values."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather_rows(self, tensors: list[Tensor]) -> tuple[list[Tensor], int]:
        """[b, E] of each process -> [size * b, E], without gradient, and this one's first row."""
        if self.size == 1:
            return tensors, 0
        whole = []
        for tensor in tensors:
            mine = tensor.detach().contiguous()
            theirs = [torch.empty_like(mine) for _ in range(self.size)]
            dist.all_gather(theirs, mine)
            whole.append(torch.cat(theirs))
        return whole, self.rank * len(tensors[0])

    def wait(self) -> None:
        """Until everybody is here."""
        if self.size > 1:
            dist.barrier()


def from_environment(device: str = "cpu") -> bool:
    """Join the processes that torchrun or accelerate started -> whether there are any.

    Reads WORLD_SIZE, RANK and so on. device: "cpu" talks over gloo; "cuda" over NCCL, one GPU a
    process. Raises MissingRequirement where there is no GPU.
    """
    if device == "cuda":
        if not torch.cuda.is_available():
            raise MissingRequirement(
                "this PyTorch sees no GPU", where="--device cuda", fix="leave it out to use the CPU"
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return False
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return True


@contextmanager
def joined(device: str = "cpu") -> Iterator[Group]:
    """``with joined() as group``: from_environment, and leave the group again at the end. A group
    that was there before is used and left alone."""
    mine = not dist.is_initialized() and from_environment(device)
    try:
        yield Group()
    finally:
        if mine:
            dist.destroy_process_group()


def shard(model: nn.Module, like: nn.Module | None = None) -> nn.Module:
    """A sharded copy of model: FSDP2 over its repeated blocks, then over what is left.

    like: the student, where model is its teacher: blocks are found by their ternary layers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    copied = copy.deepcopy(model)
    device = next(copied.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for path in observe.repeated_blocks(like or model):
        fully_shard(copied.get_submodule(path), mesh=mesh)
    # The root, too: after an evaluation its parameters are read, which must be the shards then.
    fully_shard(copied, mesh=mesh, reshard_after_forward=True)
    return copied


class Engine:
    """How a lesson is called and its gradients are shared.

    lesson: holds the student as it is trained: for "fsdp" a sharded copy.
    """

    def __init__(self, lesson: nn.Module, group: Group, kind: str) -> None:
        self.lesson, self.sharded = lesson, group.size > 1 and kind == "fsdp"
        self.wrapped: Any = lesson
        if group.size > 1 and not self.sharded:
            # Outputs the loss does not use (a pooler's) leave parameters without a gradient.
            self.wrapped = nn.parallel.DistributedDataParallel(
                lesson, broadcast_buffers=False, find_unused_parameters=True
            )

    def sharing(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a part: gradients are exchanged with the last one."""
        if self.sharded:
            self.lesson.student.set_requires_gradient_sync(last)  # type: ignore[union-attr,operator]
        elif self.wrapped is not self.lesson and not last:
            return self.wrapped.no_sync()
        return nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """A plain copy on the CPU, gathered from all processes if it is sharded."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().cpu().clone()


def put(target: Tensor, value: Tensor) -> None:
    """Write a plain tensor into target, or this process's part of it into a sharded one."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    with torch.no_grad():
        if isinstance(target, DTensor):
            # Everybody read the same value: nothing needs to be sent.
            value = distribute_tensor(
                value.to(target.device), target.device_mesh, target.placements, src_data_rank=None
            )
        target.copy_(value)
