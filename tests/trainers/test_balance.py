"""Balanced blocks: units joined as far as the largest one's memory allows, and no further."""

import gc
from functools import cache
from itertools import pairwise
from math import inf

import pytest
import torch
from torch import Tensor, nn

from converter.errors import StiefelError
from trainers.cuts import CutSettings, cut
from trainers.cuts.balance import Need
from trainers.memory import SavedActivations

NAMES = (
    "mlp",
    "smallconv",
    "resnet20",
    "resnet",
    "densenet",
    "mobilenetv1",
    "mobilenetv2",
    "vit",
    "swin",
    "dropping",
)


class Dropping(nn.Sequential):
    """Layers whose dropout saves masks, after one without."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()]
        for _ in range(5):
            layers += [nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Dropout(0.1)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_balanced_blocks_are_units_joined_as_far_as_the_largest_allows(
    name, size, factored, images
):
    network = Dropping() if name == "dropping" else factored(name)
    units, joined = (
        cut(network, images, CutSettings(**how, layers_per_block=size))
        for how in ({"boundaries": "units"}, {"memory": 0})
    )
    layers = [
        [layer for block in cuts.blocks for layer in block.layers] for cuts in (units, joined)
    ]
    assert layers[0] == layers[1]
    ends = [[block.layers[-1] for block in cuts.blocks] for cuts in (units, joined)]
    assert set(ends[1]) <= set(ends[0])
    most = max(saved_by_blocks(network, units, images))
    needs = saved_by_blocks(network, joined, images)
    assert max(needs) <= most
    # The output's side is joined first: a block has no room for the unit before it.
    need = Need(network, units, images)
    places = [-1, *(ends[0].index(end) for end in ends[1])]
    for before, last in pairwise(places):
        assert before < 0 or need(before, last) > most


@pytest.mark.parametrize("share", [0.25, 0.4, CutSettings().memory, 0.7, 1.0])
@pytest.mark.parametrize("name", ["smallconv", "resnet20", "densenet", "vit"])
def test_a_share_of_the_memory_makes_the_fewest_blocks_at_their_least_peak(
    name, share, factored, images
):
    network = factored(name)
    units, wider = (
        cut(network, images, settings)
        for settings in (CutSettings(boundaries="units"), CutSettings(memory=share))
    )
    alone = saved_by_blocks(network, units, images)
    need = Need(network, units, images)
    most = max(*alone, share * need(0, len(units.blocks) - 1))
    needs = saved_by_blocks(network, wider, images)
    assert max(needs) <= most
    peak = max([*(1.05 * own for own in needs[:-1]), needs[-1]])
    assert (len(needs), peak) == fewest_then_least(need, len(units.blocks), most)
    if share == 1:
        assert len(wider.blocks) == 1


@pytest.mark.parametrize("share", [0, 0.25, CutSettings().memory, 1.0])
@pytest.mark.parametrize("name", ["smallconv", "resnet20", "densenet", "vit"])
def test_where_the_others_learn_from_a_sample_the_last_block_is_as_wide_as_it_can_be(
    name, share, factored, images
):
    network = factored(name)
    units, joined = (
        cut(network, images, settings)
        for settings in (
            CutSettings(boundaries="units"),
            CutSettings(memory=share, sample=4),
        )
    )
    last = len(units.blocks) - 1
    need = Need(network, units, images)
    *early, own = saved_by_blocks(network, units, images)
    most = max(*(one / 4 for one in early), own, share * need(0, last))
    *early, own = saved_by_blocks(network, joined, images)
    assert max([*(one / 4 for one in early), own]) <= most
    ends = [block.layers[-1] for block in units.blocks]
    first = ends.index(joined.blocks[-2].layers[-1]) + 1 if early else 0
    assert own == need(first, last)
    assert first == 0 or need(first - 1, last) > most


def fewest_then_least(need: Need, units: int, most: float) -> tuple[float, float]:
    """The fewest blocks of at most so much, and the least peak of so many, of all cuts.

    In the peak every block but the last counts a twentieth more.
    """

    @cache
    def best(first: int) -> tuple[float, float]:
        found = [(inf, 0)] if first < units else [(0, 0)]
        for last in range(first, units):
            if (own := need(first, last)) <= most:
                blocks, peak = best(last + 1)
                beside = 1.05 if last < units - 1 else 1.0
                found.append((blocks + 1, max(beside * own, peak)))
        return min(found)

    return best(0)


def test_memory_is_shared_out_among_balanced_blocks_only(factored, images):
    for settings, said in (
        (CutSettings(boundaries="units", memory=0.5), "boundaries are units: leave one out"),
        (CutSettings(blocks=("conv*",), memory=0.5), "memory has nothing to say"),
    ):
        with pytest.raises(StiefelError, match=said):
            cut(factored("smallconv"), images, settings)


def saved_by_blocks(network: nn.Module, cuts, images: Tensor) -> list[int]:
    """Bytes that each block saves for backward, for one more image: each is run, and asked."""

    def saved(x: Tensor) -> list[int]:
        held: list[Tensor] = []
        found: list[int] = []

        def visit(index: int, roots: tuple[Tensor, ...], logits: Tensor | None) -> None:
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in held}
            found.append(sum(storage.nbytes() for storage in storages.values()))
            held.clear()

        def pack(tensor: Tensor) -> Tensor:
            held.append(tensor.detach())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            cuts.run(x, visit)
        return found

    few, more = (saved(images[:1].repeat(n, 1, 1, 1)) for n in (4, 8))
    return [(b - a) // 4 for a, b in zip(few, more, strict=True)]


def test_blocks_are_balanced_alike_whatever_the_batch_they_are_shown(factored, images):
    network = factored("smallconv")
    shown = [images, images[:1], images.repeat(20, 1, 1, 1), images.repeat(20, 1, 1, 1)[:2]]
    cuts = [[b.layers for b in cut(network, x, CutSettings()).blocks] for x in shown]
    assert all(blocks == cuts[0] for blocks in cuts)


def test_balanced_blocks_hold_no_more_than_units_do(factored, images):
    held = {}
    for boundaries, how in (("units", {"boundaries": "units"}), ("balanced", {"memory": 0})):
        network = factored("resnet20")
        cuts = cut(network, images, CutSettings(**how))
        with SavedActivations(network) as saved:
            cuts.run(images, lambda i, roots, logits: roots[0].square().mean().backward())
        held[boundaries] = saved.peak_bytes, len(cuts.blocks)
    assert held["balanced"][1] < held["units"][1]
    assert held["balanced"][0] <= 1.02 * held["units"][0]


def test_looking_for_cuts_holds_no_graph_afterwards(factored, images):
    """A hook that kept what it is given would keep all before it as long as the process runs."""
    network = factored("smallconv")
    gc.collect()
    before = _graphs()
    cut(network, images, CutSettings())
    gc.collect()
    assert _graphs() == before


def _graphs() -> int:
    return sum(type(o) is torch.Tensor and o.grad_fn is not None for o in gc.get_objects())
