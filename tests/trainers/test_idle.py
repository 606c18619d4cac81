"""What is set and changes nothing is told, and nothing else is."""

import pytest
import torch

from trainers.distributed import process_count
from trainers.rules import BP, DFA, SSA
from trainers.rules.idle import idle

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("rule", "device", "told"),
    [
        (SSA(overlap=2), CPU, ["overlap 2"]),
        (SSA(overlap=2), GPU, []),
        (SSA(storage="recomputed"), CPU, ["storage recomputed"]),
        (SSA(storage="recomputed", overlap=4), CPU, ["overlap 4", "storage recomputed"]),
        (SSA(storage="recomputed", lookahead=2), CPU, []),
        (SSA(storage="recomputed", error="global"), CPU, []),
        (DFA(storage="recomputed"), CPU, []),
        (SSA(), CPU, []),
        (BP(), CPU, []),
    ],
)
def test_what_changes_nothing_is_told(rule, device, told):
    lines = list(idle(rule, device, processes=1))
    assert len(lines) == len(told)
    for line, start in zip(lines, told, strict=True):
        assert line.startswith(start)


def test_among_processes_blocks_are_trained_in_turn(monkeypatch):
    """It is told before they have met, so torchrun's environment says how many they are."""
    assert process_count() == 1
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert process_count() == 2
    assert len(list(idle(SSA(overlap=2), GPU, process_count()))) == 1
