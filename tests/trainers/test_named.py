"""Named blocks: for networks that cannot be traced, the submodules that the user names."""

import pytest
import torch
from torch import Tensor, nn

from converter.convert import convert, plan
from converter.errors import StiefelError
from trainers.cuts import CutSettings, cut, describe_cuts
from trainers.rules import SSA, make_rule


class Branching(nn.Module):
    """Its own forward depends on the data, so it cannot be traced."""

    def __init__(self, bypass: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 12)
        self.parts = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.ReLU()) for _ in range(3))
        self.head = nn.Linear(12, 5)
        self.bypass = bypass

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x.flatten(1)[:, :12])
        if h.sum() > 1e9:
            h = h / 2
        first = h
        for part in self.parts:
            h = part(h)
        return self.head(h + first if self.bypass else h)


def test_an_untraceable_network_trains_by_the_blocks_the_user_names(images, parameters_behind):
    network = Branching()
    cuts = cut(network, images, CutSettings(blocks=("parts.*",)))
    assert [block.name for block in cuts.blocks] == ["parts.0", "parts.1", "parts.2"]
    reached = []
    logits = cuts.run(
        images, lambda index, roots, logits: reached.append(parameters_behind(*roots, logits))
    )
    torch.testing.assert_close(logits, network(images))
    stem, head = set(network.stem.parameters()), set(network.head.parameters())
    assert reached[0] == stem | set(network.parts[0].parameters())
    assert reached[1] == set(network.parts[1].parameters())
    assert reached[2] == set(network.parts[2].parameters()) | head


@pytest.mark.parametrize(
    ("network", "globs", "message"),
    [
        (Branching(bypass=True), ("parts.*",), "past a named block"),
        (Branching(), ("parts", "parts.*"), "must not contain one another"),
        (Branching(), ("layers.*",), "no submodule of Branching matches layers"),
    ],
)
def test_names_that_make_no_blocks_are_refused(network, globs, message, images):
    with pytest.raises(StiefelError, match=message):
        cut(network, images, CutSettings(blocks=globs))


@pytest.mark.parametrize("other", [{"boundaries": "layers"}, {"layers_per_block": 2}])
def test_named_blocks_leave_nothing_else_to_say_of_where_to_cut(other, images):
    with pytest.raises(StiefelError, match=f"so {min(other)} has nothing to say"):
        cut(Branching(), images, CutSettings(blocks=("parts.*",), **other))
    defaults = {name: CutSettings.model_fields[name].default for name in other}
    assert cut(Branching(), images, CutSettings(blocks=("parts.*",), **defaults)).blocks


def test_what_runs_beside_a_named_block_trains_with_it(images, parameters_behind):
    network = convert(Branching(), plan(Branching(), 3))
    cuts = cut(network, images, CutSettings(blocks=("parts.*",)))
    reached = []
    cuts.run(images, lambda index, roots, logits: reached.append(parameters_behind(*roots, logits)))
    assert reached == [set(block.parameters()) for block in cuts.blocks]
    assert set().union(*reached) == set(network.parameters())
    described = describe_cuts(network, images, CutSettings(blocks=("parts.*",)))
    assert sum(block["parameters"] for block in described) == sum(
        parameter.numel() for parameter in network.parameters()
    )


def test_a_frozen_named_block_still_counts_its_parameters(images):
    network = Branching()
    network.parts[1].requires_grad_(False)
    described = describe_cuts(network, images, CutSettings(blocks=("parts.*",)))
    assert described[1]["parameters"] == 12 * 12 + 12


def test_a_shared_block_runs_several_times_and_each_is_told_apart(images):
    network = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), *[nn.Linear(12, 12)] * 3)
    blocks = cut(network, images, CutSettings(blocks=("2",))).blocks
    assert [block.name for block in blocks] == ["2", "2:2", "2:3"]
    assert {block.layers for block in blocks} == {("2",)}
    assert [root.name for block in blocks for root in block.roots] == ["2:0", "2:2:0", "2:3:0"]


class TokensFirst(nn.Module):
    """A transformer whose tokens are in front of the batch, as torch's own has it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 5)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).flatten(2).permute(2, 0, 1)
        for layer in self.layers:
            h = layer(h)
        return self.head(h.mean(dim=0))


def test_a_block_without_the_batch_in_front_is_refused(images):
    with pytest.raises(StiefelError, match=r"'layers\.0' returns \(16, 3, 8\) of 3 images"):
        cut(TokensFirst(), images, CutSettings(blocks=("layers.*",)))


class Skipping(Branching):
    """Leaves out one of its parts, or runs one twice."""

    order = (0, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x.flatten(1)[:, :12])
        for place in self.order:
            h = self.parts[place](h)
        return self.head(h)


@pytest.mark.parametrize("order", [(0, 2), (0, 1), (0, 1, 2, 2), (1, 0, 2)])
def test_blocks_that_do_not_always_run_are_refused(order, images, labels):
    network = Skipping()
    rule = make_rule(SSA(blocks=("parts.*",)))
    state = rule.init(network, images, 5, torch.Generator().manual_seed(0))
    rule.step(network, state, images, labels)
    network.order = order
    with pytest.raises(StiefelError, match="in one forward and not in another"):
        rule.step(network, state, images, labels)
    assert not any(module._forward_hooks for module in network.modules())
