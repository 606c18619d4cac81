"""Blocks before the last learn from a few images of a batch, and let the others run through."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from converter.convert import convert, plan
from converter.errors import StiefelError
from trainers.memory import activation_memory_mib
from trainers.rules import DFA, SSA, make_rule
from trainers.rules.sampling import few, in_front, put_back


@given(st.integers(1, 40), st.integers(1, 12))
def test_the_few_are_evenly_spread_and_all_are_put_back(images, every):
    rows = torch.arange(images)[:, None]
    front = in_front(rows, every)
    spread = rows[::every]
    assert torch.equal(front[: len(spread)], spread)
    assert torch.equal(put_back(front, every), rows)
    # All of them, where norms could not tell a mean from one image.
    assert few(images, every) in (len(spread), images)
    assert few(images, every) >= 2 or images < 2
    assert images - few(images, every) != 1


def stepped(settings: SSA, network: nn.Module, x: Tensor, y: Tensor):
    """The blocks, every gradient of one step, and what the step gave."""
    rule = make_rule(settings)
    network.zero_grad()
    state = rule.init(network, x, 5, torch.Generator().manual_seed(0))
    result = rule.step(network, state, x, y, label_smoothing=0.1)
    return state, {n: p.grad.clone() for n, p in network.named_parameters()}, result


def images_and_labels(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 32, 32, generator=generator), torch.arange(count) % 5


@pytest.mark.parametrize("name", ["mlp", "smallconv", "resnet", "densenet", "mobilenetv2", "vit"])
@pytest.mark.parametrize("cosine", [0.0, 0.1])
def test_early_blocks_learn_what_they_would_from_the_few_alone(name, cosine, factored):
    network = factored(name).double()
    for module in network.modules():  # chance would tell the two apart
        if isinstance(module, nn.Dropout | nn.MultiheadAttention):
            module.eval()
    x, y = images_and_labels(8)
    rest = {"boundaries": "units", "cosine": cosine}
    state, sampled, _ = stepped(SSA(sample=4, **rest), network, x.double(), y)
    _, alone, _ = stepped(SSA(**rest), network, x[::4].double(), y[::4])
    blocks = state.cuts.blocks
    assert len(blocks) > 2
    early = {p for block in blocks[:-1] for p in block.parameters()}
    names = [n for n, p in network.named_parameters() if p in early]
    for key in names:
        torch.testing.assert_close(sampled[key], alone[key], msg=key)
    late = [n for n, p in network.named_parameters() if p not in early]
    assert any(not torch.allclose(sampled[key], alone[key]) for key in late)


def test_the_last_block_learns_from_all_and_logits_come_in_the_order_of_the_images(factored):
    network = factored("smallconv").double().eval()  # norms go by what was
    x, y = images_and_labels(11)
    state, sampled, result = stepped(SSA(sample=3), network, x.double(), y)
    _, whole, plain = stepped(SSA(boundaries="balanced", memory=0), network, x.double(), y)
    torch.testing.assert_close(result.logits, network(x.double()).detach())
    torch.testing.assert_close(result.loss, plain.loss)
    last = set(state.cuts.blocks[-1].parameters())
    named = [n for n, p in network.named_parameters() if p in last and "classifier.4" in n]
    assert named
    for key in named:
        torch.testing.assert_close(sampled[key], whole[key], msg=key)


def test_what_runs_through_first_keeps_no_gradient_from_the_few_in_bf16(factored):
    network = factored("smallconv")
    x, y = images_and_labels(16)
    _, exact, _ = stepped(SSA(sample=4, boundaries="units"), network, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        _, coarse, _ = stepped(SSA(sample=4, boundaries="units"), network, x, y)
    for name, gradient in exact.items():
        flat = gradient.flatten(), coarse[name].flatten()
        assert torch.cosine_similarity(*flat, dim=0) > 0.95, name


def test_a_batch_too_small_to_be_shared_out_is_learned_from_whole(factored):
    x, y = images_and_labels(4)
    network, rest = factored("smallconv").eval(), {"boundaries": "units"}
    _, sampled, _ = stepped(SSA(sample=4, **rest), network, x, y)
    _, whole, _ = stepped(SSA(**rest), network, x, y)
    torch.testing.assert_close(sampled, whole)


@pytest.mark.parametrize("name", ["smallconv", "resnet20", "densenet", "vit"])
def test_what_is_held_shrinks_with_the_images_learned_from(name, factored):
    network = factored(name)
    batch, held = torch.randn(32, 3, 32, 32), {}
    for memory in (0, 1):
        rule = SSA(memory=memory, sample=4)
        held[memory] = activation_memory_mib(network, rule, batch, num_classes=5)
    assert held[0] < 0.35 * held[1]
    whole = activation_memory_mib(network, SSA(memory=0), batch, num_classes=5)
    assert held[0] < 0.7 * whole


class Winning(nn.Module):
    """Sends past two layers which image of the batch has most of each feature."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 12), nn.Linear(12, 12)
        self.third, self.head = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x.mean(dim=(2, 3))))
        winner = h.argmax(dim=0)
        h = torch.relu(self.third(torch.relu(self.second(h))))
        return self.head(h) + winner[:5]


def refusal(settings: SSA, network: nn.Module, teacher: nn.Module | None = None) -> str:
    x, _ = images_and_labels(8)
    with pytest.raises(StiefelError) as caught:
        make_rule(settings).init(network, x, 5, torch.Generator(), teacher)
    return str(caught.value)


def test_what_cannot_be_shared_out_is_refused(dense, factored):
    winning = Winning()
    winning = convert(winning, plan(winning, 2))
    text = refusal(SSA(sample=2, boundaries="layers"), winning)
    assert "'argmax' crosses a cut (12,) for 3 images, without the batch in front" in text
    network = factored("smallconv")
    assert "error: layerwise, and no teacher" in refusal(SSA(sample=2, error="global"), network)
    taught = refusal(SSA(sample=2), network, dense("smallconv"))
    assert "error: layerwise, and no teacher" in taught
    named = refusal(SSA(sample=2, blocks=("features", "classifier")), network)
    assert "blocks names the blocks, so sample has nothing to say" in named
    with pytest.raises(ValidationError, match="sample needs a layerwise error"):
        DFA(sample=2)
