"""The random number generators of this process: their state, and seeds for a while."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

from ..compat import torch_features


def random_state() -> dict:
    """Return the state of all generators, as plain values."""
    version, internal, gauss_next = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = dict(
        python=(version, torch.tensor(internal), gauss_next),
        numpy=(name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        torch=torch.get_rng_state(),
    )
    if accelerator := torch_features.accelerator():
        state[accelerator] = torch_features.device_module(accelerator).get_rng_state()
    return state


def set_random_state(state: dict) -> None:
    """Restore what :func:`random_state` returned, whatever device its tensors are on."""
    version, internal, gauss_next = state['python']
    random.setstate((version, tuple(internal.tolist()), gauss_next))
    name, keys, *rest = state['numpy']
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state['torch'].cpu())
    accelerator = torch_features.accelerator()
    if accelerator in state:
        torch_features.device_module(accelerator).set_rng_state(state[accelerator].cpu())


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Restore the CPU's generators after this context: loading data uses these."""
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(pytorch)


@contextlib.contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed the CPU's generators with ``numbers`` within this context, then restore them."""
    words = np.random.SeedSequence(numbers).generate_state(4)
    with restored():
        random.seed(int(words[0]))
        np.random.seed(words[1:3])
        # the CPU generator: torch.manual_seed would initialize CUDA, which workers must not
        torch.default_generator.manual_seed(int(words[3]))
        yield
