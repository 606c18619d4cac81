"""Random numbers that a seed fixes and a resumed run takes up; the caller's stay as they were."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def repeatable(seed: int, device: torch.device, *, deterministic: bool) -> Iterator[None]:
    """Meanwhile all generators start from `seed`; afterwards they are as they were.

    Args:
        deterministic: also forbid algorithms whose result varies from run to run, where torch has
            others.
    """
    devices = [device] if device.type == "cuda" else []
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    numbers = host_state()
    with torch.random.fork_rng(devices=devices):
        seed_host(seed)
        torch.manual_seed(seed)  # the device's too
        try:
            if deterministic:
                torch.use_deterministic_algorithms(True, warn_only=True)
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn_only)
            restore_host_state(numbers)


def seed_host(seed: int) -> None:
    """Let all that a network or a data set may draw from on the host begin at `seed`."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def host_state() -> dict[str, Any]:
    """The generators of the host: Python's, numpy's global one and torch's; plain, to compare."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tobytes(), *rest),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }


def restore_host_state(state: dict[str, Any]) -> None:
    """Go on from where `host_state` was taken."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.frombuffer(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.frombuffer(bytearray(state["torch"]), dtype=torch.uint8))


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of the generators that training on `device` uses."""
    state = host_state()
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Go on from where `random_state` was taken."""
    restore_host_state(state)
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
