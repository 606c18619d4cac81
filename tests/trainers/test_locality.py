"""No gradient crosses a cut: what a later block is, or sends back, changes nothing before it."""

import pytest
import torch

from trainers.cuts import CutSettings, cut
from trainers.rules import BP, DFA, SSA, make_rule

NETWORKS = ["resnet", "densenet", "mobilenetv2", "vit"]
# No memory to spare, so that there are many blocks.
LOCAL = {
    "layer-wise": SSA(memory=0, alpha=0.1, beta=0.1, cosine=0.1, hoyer=0.1),
    "layer-wise, by default": SSA(),
    "layer-wise, cut at layers": SSA(boundaries="layers"),
    "layer-wise, of a sample": SSA(memory=0, sample=2),
    "layer-wise, linear read-outs": SSA(memory=0, readout_layers=0),
    "layer-wise, fixed": SSA(memory=0, feedback="fixed"),
    "layer-wise, kolen-pollack": SSA(memory=0, feedback="kolen-pollack"),
    "layer-wise, calibrated": SSA(memory=0, feedback="calibrated"),
    "distillation": SSA(memory=0, distillation=1.0),
    "distillation, looking ahead": SSA(memory=0, distillation=1.0, lookahead=2),
    "looking ahead, cut at layers": SSA(distillation=1.0, lookahead=1, boundaries="layers"),
}
GLOBAL = {
    "global": SSA(memory=0, error="global", similarity=1.0),
    "global, recomputed": SSA(memory=0, error="global", storage="recomputed", feedback="fixed"),
    "global, kolen-pollack": SSA(memory=0, error="global", feedback="kolen-pollack"),
    "dfa": DFA(memory=0),
    "dfa, recomputed": DFA(memory=0, storage="recomputed"),
}


def gradients(rule, network, state, images, labels) -> dict[str, torch.Tensor]:
    """One step's gradients of the network and the state, and batch norm's statistics put back."""
    buffers = {k: v.clone() for k, v in network.named_buffers()}
    network.zero_grad()
    state.zero_grad()
    torch.manual_seed(7)
    rule.step(network, state, images, labels)
    for name, buffer in network.named_buffers():
        buffer.copy_(buffers[name])
    named = [*network.named_parameters(), *state.named_parameters()]
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def perturb(parameters) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter))


def changed_before(settings, network, images, labels, teacher=None) -> set[str]:
    """Names of the parameters up to the middle block whose gradient a change after it moves."""
    rule = make_rule(settings)
    generator = torch.Generator().manual_seed(0)
    state = rule.init(network, images, 5, generator, teacher)
    asked = settings.model_dump(include={*CutSettings.model_fields}, exclude_unset=True)
    if isinstance(settings, BP):
        asked = {"boundaries": "units"}
    blocks = cut(network, images, CutSettings(**asked)).blocks
    middle = len(blocks) // 2
    early = {p for block in blocks[:middle] for p in block.parameters()}
    late = {p for block in blocks[middle:] for p in block.parameters()} - early
    assert early
    assert late
    before = gradients(rule, network, state, images, labels)
    perturb(late)
    after = gradients(rule, network, state, images, labels)
    names = {n for n, p in network.named_parameters() if p in early}
    assert names <= set(before)
    late_names = {n for n, p in network.named_parameters() if p in late}
    assert any(not torch.equal(before[n], after[n]) for n in late_names)
    return {n for n in names if not torch.equal(before[n], after[n])}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("settings", LOCAL.values(), ids=LOCAL)
def test_later_blocks_change_no_earlier_gradient(name, settings, dense, factored, images, labels):
    teacher = dense(name) if settings.distillation else None
    assert changed_before(settings, factored(name), images, labels, teacher) == set()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("settings", GLOBAL.values(), ids=GLOBAL)
def test_later_blocks_reach_earlier_ones_only_through_the_output_error(
    name, settings, factored, images, labels, monkeypatch
):
    error = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr("trainers.rules.passes.output_error", lambda *_: error)
    assert changed_before(settings, factored(name), images, labels) == set()


@pytest.mark.parametrize(
    "settings", [SSA(memory=0, error="global"), DFA(memory=0), BP()], ids=lambda s: s.name
)
def test_the_check_sees_what_does_cross(settings, factored, images, labels):
    changed = changed_before(settings, factored("resnet"), images, labels)
    assert "conv1.weight" in changed
    assert "layer1.0.conv1.U" in changed
