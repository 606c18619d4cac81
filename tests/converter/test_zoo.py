"""The zoo's networks: traceable, of the published sizes, and at home with public checkpoints."""

import pytest
import torch

from converter.zoo import ZOO, default_input


def example(name: str, **args) -> torch.Tensor:
    return torch.randn(2, *default_input(name, args).shape)


@pytest.mark.parametrize("name", [n for n in ZOO if n not in ("resnet44", "resnet110")])
def test_a_traced_network_computes_what_the_network_does(name):
    model = ZOO[name]().eval()
    x = example(name)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize("name", [n for n in ZOO if n not in ("resnet44", "resnet110")])
def test_every_network_takes_other_classes_and_channels(name):
    args = {"num_classes": 7, "in_channels": 2}
    model = ZOO[name](**args).eval()
    assert model(example(name, **args)).shape == (2, 7)


@pytest.mark.parametrize("name", ["digits", "smallconv", "mlp", "vgg8", "vit"])
def test_networks_with_flattened_features_or_places_take_another_size(name):
    model = ZOO[name](size=16).eval()
    assert model(example(name, size=16)).shape == (2, 10)


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]
)
def test_residual_networks_have_the_parameters_of_he_et_al_table_6(depth, millions):
    count = sum(p.numel() for p in ZOO[f"resnet{depth}"]().parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


def test_a_densenet_has_the_parameters_of_huang_et_al_table_2():
    count = sum(p.numel() for p in ZOO["densenet"](growth=12, layers=16).parameters())
    assert count / 1e6 == pytest.approx(0.8, abs=0.05)


def test_option_a_shortcut_keeps_pixels_and_adds_zero_channels_on_both_sides():
    shortcut = ZOO["resnet20"]().layer2[0].shortcut
    x = torch.randn(1, 16, 8, 8)
    y = shortcut(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def test_the_digits_network_has_room_to_be_halved():
    count = sum(p.numel() for p in ZOO["digits"]().parameters())
    assert 60_000 < count < 100_000


@pytest.mark.parametrize("name", ["mobilenetv1", "vgg8", "vgg13"])
def test_width_scales_every_layer(name):
    narrow, wide = (ZOO[name](width=width) for width in (0.25, 0.5))
    counts = [sum(p.numel() for p in model.parameters()) for model in (narrow, wide)]
    assert counts[0] < counts[1] / 3
    assert narrow.eval()(example(name)).shape == (2, 10)
    assert len(narrow.state_dict()) == len(wide.state_dict())
