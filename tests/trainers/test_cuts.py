"""Blocks: the same function as the network, every parameter in one, and no graph across a cut."""

import copy
import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from converter.errors import StiefelError
from converter.factors import factored_layers
from trainers.cuts import CutSettings, Root, cut, cut_alike, describe_cuts
from trainers.memory import SavedActivations

NAMES = [
    "mlp",
    "smallconv",
    "resnet20",
    "resnet",
    "densenet",
    "mobilenetv1",
    "mobilenetv2",
    "vit",
    "swin",
    "shared",
]
UNITS = CutSettings(boundaries="units")
LAYERS = CutSettings(boundaries="layers")
SMALL = CutSettings(memory=0)  # balanced, and more blocks than by default


@pytest.mark.parametrize(
    "settings", [CutSettings(), SMALL, UNITS, LAYERS], ids=["default", "small", "units", "layers"]
)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["dense", "factored"])
def test_no_graph_crosses_a_cut_and_every_parameter_has_a_block(
    name, form, settings, request, images, parameters_behind
):
    network = request.getfixturevalue(form)(name)
    cuts = cut(network, images, settings)
    assert len(cuts.blocks) > 1
    everything: set[Tensor] = set()

    def visit(index, roots, logits):
        reached = parameters_behind(*roots, logits)
        assert reached
        assert reached <= set(cuts.blocks[index].parameters())
        everything.update(reached)

    cuts.run(images, visit)
    unused = [n for n, p in network.named_parameters() if p not in everything]
    # Nothing may be left without a local loss.
    assert unused == []


@pytest.mark.parametrize("name", NAMES)
def test_blocks_compute_what_the_network_computes(name, factored, images):
    network = factored(name).eval()
    if name == "swin":
        for module in network.modules():
            if type(module).__name__ == "StochasticDepth":
                module.p = 0.0
    cuts = cut(network, images, SMALL)
    with torch.no_grad():
        torch.testing.assert_close(cuts.run(images, lambda *_: None), network(images))


def test_batch_norm_sees_each_batch_once(factored, images):
    blockwise, whole = factored("resnet20"), factored("resnet20")
    cut(blockwise, images, SMALL).run(images, lambda *_: None)
    whole(images)
    for (name, ours), theirs in zip(blockwise.named_buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_cutting_leaves_modes_buffers_and_attributes_alone(factored, images):
    network = factored("vit")
    network.encoder.layers[0].eval()
    modes = [m.training for m in network.modules()]
    attributes = set(vars(network))
    state = {k: v.clone() for k, v in network.state_dict().items()}
    cut(network, images, SMALL)
    assert [m.training for m in network.modules()] == modes
    assert set(vars(network)) == attributes
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())


def test_residual_nets_are_cut_between_units_and_the_head_joins_the_last(factored, images):
    cuts = cut(factored("resnet20"), images, UNITS)
    units = [f"layer{stage}.{unit}" for stage in (1, 2, 3) for unit in range(3)]
    assert [block.name for block in cuts.blocks] == ["conv1", *units]
    assert cuts.blocks[-1].layers == ("layer3.2.conv1", "layer3.2.conv2", "linear")
    assert [root.shape for root in cuts.blocks[-1].roots] == [(64, 8, 8)]


def test_features_are_taken_after_the_activation_and_before_the_pooling(factored, images):
    cuts = cut(factored("smallconv"), images, UNITS)
    assert [block.roots[0].shape for block in cuts.blocks] == [
        (32, 32, 32),
        (64, 16, 16),
        (128, 8, 8),
        (128,),
    ]
    seen = []
    cuts.run(images, lambda index, roots, logits: seen.append(roots[0].min().item()))
    assert seen == [0.0] * 4


@pytest.mark.parametrize(("size", "blocks"), [(1, 10), (2, 9), (4, 5), (100, 1)])
def test_layers_per_block_widens_the_blocks(size, blocks, factored, images):
    settings = CutSettings(boundaries="units", layers_per_block=size)
    cuts = cut(factored("resnet20"), images, settings)
    assert len(cuts.blocks) == blocks


@pytest.mark.parametrize("size", [3, 10])
# Swin's attention counts as the layers whose weights it takes; a shared layer as often as it runs.
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("swin", "shared")])
def test_every_block_but_the_last_has_the_layers_asked_for(name, size, factored, images):
    network = factored(name)
    alone, joined = (
        cut(network, images, CutSettings(boundaries="units", layers_per_block=n)).blocks
        for n in (1, size)
    )
    assert all(len(block.layers) >= size for block in joined[:-1])
    assert sum((b.layers for b in joined), ()) == sum((b.layers for b in alone), ())
    # Wider blocks are units joined: none is cut where units are not.
    assert {b.layers[-1] for b in joined} <= {b.layers[-1] for b in alone}


class _OwnNorm(nn.BatchNorm2d):
    """A norm that is not torch's own class, whose forward could be traced through."""

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        return F.batch_norm(x, mean, variance, self.weight, self.bias, self.training)


@pytest.mark.parametrize("boundaries", ["balanced", "units", "layers"])
def test_cutting_leaves_statistics_of_derived_norms_alone(boundaries):
    layers = [nn.Conv2d(3, 6, 3, 2, 1), _OwnNorm(6), nn.ReLU(), nn.Conv2d(6, 6, 3, 2, 1)]
    network = nn.Sequential(*layers, _OwnNorm(6), nn.Flatten(), nn.Linear(6, 5))
    before = copy.deepcopy(network.state_dict())
    cuts = cut(network, torch.randn(6, 3, 4, 4), CutSettings(boundaries=boundaries))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    cuts.run(torch.randn(6, 3, 4, 4), lambda *_: None)
    assert network[1].running_mean.any()


def test_whole_numbers_are_cut_too():
    layers = [nn.Embedding(9, 6), nn.Flatten(), nn.Linear(24, 6), nn.ReLU(), nn.Linear(6, 5)]
    network, words = nn.Sequential(*layers), torch.randint(9, (6, 4))
    cuts = cut(network, words, SMALL)
    torch.testing.assert_close(cuts.run(words, lambda *_: None), network(words))


def test_a_dense_block_of_a_densenet_is_cut_inside(factored, images):
    names = [block.name for block in cut(factored("densenet"), images, UNITS).blocks]
    assert "features.denseblock1.denselayer1" in names
    assert "features.denseblock1.denselayer5" in names


def test_maps_tokens_and_channels_last_maps_are_told_apart(factored, images):
    layouts = {
        name: cut(factored(name), images, SMALL).blocks[1].roots[0].layout
        for name in ("mlp", "resnet", "vit", "swin")
    }
    assert layouts == {"mlp": "flat", "resnet": "map", "vit": "tokens", "swin": "map-last"}


def test_pooled_features_are_channel_means_over_the_grid(factored, images):
    for name in ("resnet", "swin"):
        cuts = cut(factored(name), images, SMALL)
        root, found = cuts.blocks[0].roots[0], []
        cuts.run(images, lambda index, roots, logits, found=found: found.append(roots))
        h = found[0][0]
        z = root.pooled(h, 1)
        assert z.shape == (6, root.features(1)) == (6, root.channels)
        sides = (1, 2) if root.layout == "map-last" else (2, 3)
        torch.testing.assert_close(z, h.mean(dim=sides))


def test_truncation_after_the_cut_takes_effect(factored, images, parameters_behind):
    network = factored("swin").eval()
    cuts = cut(network, images, SMALL)
    for layer in factored_layers(network).values():
        layer.truncate_(torch.arange(2))
    reached: set[Tensor] = set()
    cuts.run(images, lambda index, roots, logits: reached.update(parameters_behind(*roots, logits)))
    assert set(network.parameters()) <= reached


def test_one_block_of_activations_is_alive_at_a_time(factored, images):
    network = factored("resnet20")
    cuts = cut(network, images, SMALL)
    with SavedActivations(network) as immediate:
        cuts.run(images, lambda i, roots, logits: roots[0].square().mean().backward())
    with SavedActivations(network) as backprop:
        network(images).sum().backward()
    assert immediate.peak_bytes < backprop.peak_bytes / 4


def test_the_teacher_is_cut_where_the_network_is(dense, factored, images):
    for name in ("resnet20", "vit", "swin"):
        network, settings = factored(name), SMALL
        cuts = cut(network, images, settings)
        teacher = dense(name).eval()
        alike = cut_alike(cuts, teacher, images, settings)
        shapes = [[h.shape for h in roots] for roots, _ in alike.walk(images)]
        assert shapes == [[(6, *root.shape) for root in block.roots] for block in cuts.blocks]
        *_, (_, logits) = alike.walk(images)
        torch.testing.assert_close(logits, teacher(images))


@pytest.mark.parametrize("other", ["smallconv", "resnet"])
def test_a_teacher_of_another_structure_is_refused(other, dense, factored, images):
    cuts = cut(factored("resnet20"), images, SMALL)
    with pytest.raises(StiefelError, match="give the dense original"):
        cut_alike(cuts, dense(other), images, SMALL)


def test_blocks_of_a_shared_layer_are_told_apart(factored, images):
    names = [block.name for block in cut(factored("shared"), images, SMALL).blocks]
    assert names == ["stem", "twice", "twice:2"]


def test_cuts_are_described_as_plain_data(factored, images):
    network = factored("vit")
    described = json.loads(json.dumps(describe_cuts(network, images, SMALL)))
    assert [entry["block"] for entry in described][:2] == [
        "conv_proj",
        "encoder.layers.encoder_layer_0.self_attention",
    ]
    assert described[0]["roots"] == [{"name": "conv_proj", "shape": [32, 4, 4]}]
    assert sum(entry["parameters"] for entry in described) == sum(
        p.numel() for p in network.parameters()
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("sides", "grid"), [((8, 8), 4), ((7, 7), 4), ((6, 9), 3), ((2, 2), 4)])
def test_pooling_is_adaptive_pooling_whatever_the_sides(sides, grid, layout):
    root = Root("h", (5, *sides), "map")
    h = torch.randn(3, 5, *sides, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    expected = F.adaptive_avg_pool2d(h, tuple(min(grid, side) for side in sides)).flatten(1)
    z, signal = root.pooled(h, grid), torch.randn_like(expected)
    torch.testing.assert_close(z, expected)
    assert expected.shape[1] == root.features(grid)
    wanted, found = (torch.autograd.grad(y, h, signal)[0] for y in (expected, z))
    torch.testing.assert_close(found, wanted)
    assert found.is_contiguous(memory_format=layout)
