"""What read-outs see of a block's roots: averaged maps, or what convolutions make of them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from converter.errors import StiefelError
from trainers.cuts.blocks import make_root
from trainers.feedback import random_factors
from trainers.readout import Features, HiddenLayers
from trainers.rules import SSA, make_rule

IMAGE = (2, 3, 32, 32)
SHAPES = {"map": (6, 16, 16), "map-last": (16, 16, 6), "flat": (24,), "tokens": (9, 6)}


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _hidden(root, layers: int = 2) -> HiddenLayers:
    return HiddenLayers(root, 4, layers, 10, _generator())


@pytest.mark.parametrize("layout", SHAPES)
def test_features_are_as_many_as_they_say(layout):
    root = make_root("h", (2, *SHAPES[layout]), IMAGE)
    assert root.layout == layout
    h = torch.randn(2, *SHAPES[layout])
    view = Features(root, 4)
    assert view(h).shape == (2, view.count)
    torch.testing.assert_close(view(h), root.pooled(h, 4))


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", ["map", "map-last"])
def test_hidden_layers_are_convolutions_beside_the_averaged_map(layout, layers):
    root = make_root("h", (2, *SHAPES[layout]), IMAGE)
    view = Features(root, 4, _hidden(root, layers))
    maps = torch.randn(2, 6, 16, 16)
    averaged = expected = F.avg_pool2d(maps, 2)
    for place, layer in enumerate(view.hidden.layers):
        assert layer.kernel_size == (3, 3)
        if place == 2:  # the first two see twice the grid
            averaged, expected = F.avg_pool2d(averaged, 2), F.avg_pool2d(expected, 2)
        expected = F.conv2d(expected, layer.weight, padding=1)
        variance, mean = torch.var_mean(expected, (0, 2, 3), correction=0, keepdim=True)
        expected = ((expected - mean) / (variance + 1e-5).sqrt()).relu()
    expected = F.adaptive_avg_pool2d(torch.cat([averaged, expected], 1), 4).flatten(1)
    h = maps if layout == "map" else maps.permute(0, 2, 3, 1)
    torch.testing.assert_close(view(h), expected)
    assert view.count == expected.shape[1] == (6 + 10) * 4 * 4


@pytest.mark.parametrize("layers", [2, 4])
def test_hidden_layers_on_a_map_smaller_than_the_grid_see_it_whole(layers):
    root = make_root("h", (2, 6, 2, 2), IMAGE)
    view = Features(root, 4, _hidden(root, layers))
    assert view.hidden.output.shape == (16, 2, 2)
    assert view(torch.randn(5, 6, 2, 2)).shape == (5, view.count) == (5, (6 + 10) * 2 * 2)


def test_hidden_layers_are_drawn_from_their_generator_alone():
    root = make_root("h", (2, *SHAPES["map"]), IMAGE)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, other = _hidden(root), _hidden(root)
    assert torch.equal(torch.rand(3), expected)
    for name, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
        assert value.any() == name.endswith("weight")


def test_hidden_layers_see_the_same_in_evaluation_and_keep_nothing_of_a_batch():
    root = make_root("h", (2, *SHAPES["map"]), IMAGE)
    view, h = Features(root, 4, _hidden(root)), torch.randn(5, *SHAPES["map"])
    torch.testing.assert_close(view.train()(h), view.eval()(h))
    assert not list(view.buffers())


def test_feedback_goes_to_the_channels_of_its_basis_averaged_over_cells():
    root = make_root("h", (2, 4, 9, 9), IMAGE)
    B_U = random_factors(4 * 9, 3, 3, _generator()).U
    Q = Features(root, 3).channels(B_U, 2)
    assert Q.shape == (4, 2)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(2))
    mean = B_U.reshape(4, 9, 3).mean(dim=1)[:, :2]
    torch.testing.assert_close(Q @ Q.mT @ mean, mean)


def test_feedback_through_hidden_layers_goes_to_the_channels_they_listen_to_most():
    root = make_root("h", (2, *SHAPES["map"]), IMAGE)
    view = Features(root, 4, _hidden(root))
    with torch.no_grad():
        view.hidden.layers[0].weight[:, [0, 2, 3, 5]] *= 1e-3
    Q = view.channels(torch.zeros(view.count, 5), 2)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(2))
    assert Q[[1, 4]].square().sum() > 2 - 1e-4


def test_a_map_of_one_pixel_has_no_hidden_layers(images):
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Flatten())
    network.append(nn.Linear(8, 5))
    state = make_rule(SSA(readout_layers=1)).init(network, images, 5, _generator())
    assert [root.shape for root in state.cuts.blocks[0].roots] == [(8, 1, 1)]
    assert state.views[0][0].hidden is None


def test_no_hidden_layer_sees_a_single_cell(factored, images, labels):
    rule = make_rule(SSA(boundaries="units", pool=1))
    network = factored("resnet20").eval()
    state = rule.init(network, images, 5, _generator())
    assert {len(view.hidden.layers) for views in state.views[:-1] for view in views} == {1, 2}
    rule.step(network, state, images[:1], labels[:1])  # whose norms have four values each


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [(None, 4, 1), (3, 3, 3), (1, 1, 1)],
    ids=["default", "three", "one"],
)
def test_read_outs_are_as_deep_as_the_layers_that_follow_are_many_unless_asked_otherwise(
    factored, images, asked, first, last
):
    rule = make_rule(SSA(boundaries="units", readout_layers=asked))
    state = rule.init(factored("resnet20"), images, 5, _generator())
    depths = [len(view.hidden.layers) for views in state.views[:-1] for view in views]
    assert depths == sorted(depths, reverse=True)
    assert (depths[0], depths[-1]) == (first, last)


def test_tokens_and_flat_features_are_read_out_as_they_are(factored, images):
    network = factored("vit")
    rule = make_rule(SSA(readout_layers=2))
    state = rule.init(network, images, 5, _generator())
    roots = [view for views in state.views for view in views]
    assert {view.root.is_map for view in roots} == {view.hidden is not None for view in roots}


def test_hidden_layers_learn_with_the_block_s_own_loss_and_reach_the_block(
    factored, images, labels
):
    network = factored("smallconv")
    rule = make_rule(SSA(readout_layers=1, readout_width=8, similarity=0.0))
    state = rule.init(network, images, 5, _generator())
    rule.step(network, state, images, labels)
    first, view = state.cuts.blocks[0], state.views[0][0]
    found = [p.grad.clone() for p in (*first.parameters(), *view.parameters())]
    network.zero_grad()
    state.zero_grad()
    h = nn.Sequential(*list(network.features)[:3])(images)
    F.cross_entropy(state.feedback[0][0](view(h)), labels).backward()
    wanted = [p.grad for p in (*first.parameters(), *view.parameters())]
    assert all(gradient.any() for gradient in wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_layers_of_a_read_out_that_is_not_there_are_refused_or_left_out(dense, factored, images):
    with pytest.raises(StiefelError, match="readout_layers .* need error: layerwise"):
        make_rule(SSA(error="global", readout_layers=1)).init(
            factored("smallconv"), images, 5, _generator()
        )
    taught = make_rule(SSA(readout_layers=1))
    state = taught.init(factored("smallconv"), images, 5, _generator(), dense("smallconv"))
    assert all(view.hidden is None for views in state.views for view in views)
