"""Share what one rank finds with all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from mmengine import dist

Found = TypeVar('Found')


def on_main(find: Callable[[], Found]) -> Found:
    """Call ``find`` in the main process; return its result, or raise its error, in all of them."""
    outcome: list[Any] = [None, None]
    if dist.is_main_process():
        try:
            outcome[0] = find()
        except Exception as error:  # noqa: BLE001 - the other ranks are waiting for it
            if not dist.is_distributed():
                raise
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def any_rank(flag: bool) -> bool:
    """Return whether a flag is set in any of the processes."""
    if not dist.is_distributed():
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, op='max')
    return bool(flags)
