"""The account of activations held for backward agrees with what can be worked out by hand."""

import pytest
import torch
from torch import nn

from converter.convert import convert, plan
from converter.zoo import CifarResNet
from trainers.memory import SavedActivations, activation_memory_mib, allocator_peak
from trainers.rules import BP, SSA

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


def test_the_rule_s_own_parameters_are_not_activations():
    model, readout = nn.Linear(10, 6), nn.Linear(6, 5)
    with SavedActivations(model, readout) as saved:
        output = readout(model(torch.randn(8, 10)))
    assert saved.peak_bytes == FLOAT * 8 * (10 + 6)
    output.sum().backward()


def test_the_teacher_s_parameters_are_not_activations():
    network, teacher = (nn.Sequential(*[nn.Linear(64, 64) for _ in range(3)]) for _ in range(2))
    rule, batch = SSA(lookahead=2), torch.randn(2, 64)
    used = activation_memory_mib(network, rule, batch, num_classes=64, teacher=teacher)
    assert 0 < used * 2**20 < FLOAT * 64 * 64  # less than a layer's weight


def test_the_allocator_s_peak_counts_all_that_is_there_at_once():
    def work():
        one = torch.ones(2**20)
        two = one * 2
        del one
        return two.sum() + torch.ones(2**18).sum()

    before = torch.ones(2**22)  # held already, so not counted
    peak = allocator_peak(work, torch.device("cpu"))
    assert 2 * FLOAT * 2**20 <= peak < 2 * FLOAT * 2**20 + 4096
    assert before.sum() == 2**22


def test_immediate_blocks_hold_as_much_however_deep_the_network():
    held = []
    for depth in (20, 44):  # read-outs grow no deeper from here on
        network = CifarResNet(depth, num_classes=5)
        network = convert(network, plan(network, 4)).train()
        images = torch.randn(4, 3, 32, 32)
        local, backprop = (
            activation_memory_mib(network, rule, images, num_classes=5)
            for rule in (SSA(memory=0), BP())
        )
        held.append((local, backprop))
    (few, little), (many, much) = held
    assert many == pytest.approx(few, rel=0.02)
    assert much > 2 * little
