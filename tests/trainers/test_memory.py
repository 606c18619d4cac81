"""The account of activations held for backward agrees with what can be worked out by hand."""

import torch
from torch import nn

from trainers.memory import SavedActivations, activation_memory_mib
from trainers.rules import BP

FLOAT = 4


def test_a_linear_chain_holds_the_inputs_of_its_layers_and_relu_masks():
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    x = torch.randn(8, 10)
    with SavedActivations(model) as saved:
        output = model(x)
    # Input of the first layer, and relu's output, which is the second layer's input: once.
    assert saved.peak_bytes == FLOAT * 8 * (10 + 20)
    output.sum().backward()


def test_what_backward_frees_no_longer_counts():
    layers = [nn.Linear(16, 16) for _ in range(4)]
    model = nn.Sequential(*layers)
    with SavedActivations(model) as saved:
        h = torch.randn(8, 16)
        for layer in layers:
            layer(h.detach()).square().sum().backward()
            h = layer(h).detach()
    one_layer = FLOAT * 8 * 16 * 2  # its input, and its output for the square
    assert saved.peak_bytes == one_layer


def test_nothing_is_held_without_gradients():
    model = nn.Linear(4, 4)
    with torch.no_grad(), SavedActivations(model) as saved:
        model(torch.randn(2, 4))
    assert saved.peak_bytes == 0


def test_measuring_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3)).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    used = activation_memory_mib(model, BP(), torch.randn(8, 1, 4, 4), num_classes=3)
    assert used > 0
    assert not model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(p.grad is None for p in model.parameters())
