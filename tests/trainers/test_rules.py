"""The rules behind one interface: what each step leaves in `.grad`, and that it learns."""

import copy
import json
from functools import partial

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from converter.errors import StiefelError
from converter.factors import factored_layers
from trainers.losses import output_error
from trainers.rules import BP, DFA, SSA, make_rule

EVERY_RULE = {
    "bp": BP(),
    "dfa": DFA(),
    "layer-wise": SSA(),
    "layer-wise, fixed": SSA(feedback="fixed"),
    "layer-wise, kolen-pollack": SSA(feedback="kolen-pollack"),
    "layer-wise, calibrated": SSA(feedback="calibrated"),
    "layer-wise, linear read-outs": SSA(readout_layers=0),
    "global": SSA(error="global"),
    "global, recomputed": SSA(error="global", storage="recomputed"),
    "global, fixed": SSA(error="global", feedback="fixed"),
    "global, kolen-pollack": SSA(error="global", feedback="kolen-pollack"),
    "all terms": SSA(alpha=0.1, beta=0.1, cosine=0.1, hoyer=0.1),
    "all terms, linear read-outs": SSA(
        alpha=0.1, beta=0.1, cosine=0.1, hoyer=0.1, readout_layers=0
    ),
}


def start(settings, network, images, teacher=None):
    rule = make_rule(settings)
    state = rule.init(network, images, 5, torch.Generator().manual_seed(0), teacher)
    return rule, state


def grads(*modules) -> dict[str, torch.Tensor]:
    named = [item for module in modules for item in module.named_parameters()]
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("settings", EVERY_RULE.values(), ids=EVERY_RULE)
def test_every_parameter_gets_a_finite_gradient(settings, factored, images, labels):
    network = factored("resnet")
    rule, state = start(settings, network, images)
    result = rule.step(network, state, images, labels, label_smoothing=0.1)
    for name, parameter in [*network.named_parameters(), *state.named_parameters()]:
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert result.logits.shape == (6, 5)
    tensors = [result.loss, result.logits, *result.per_block.values()]
    assert not any(t.requires_grad for t in tensors)


@pytest.mark.parametrize("settings", EVERY_RULE.values(), ids=EVERY_RULE)
def test_the_reported_loss_is_the_cross_entropy_of_the_output(settings, factored, images, labels):
    network = factored("smallconv")
    rule, state = start(settings, network, images)
    expected = F.cross_entropy(copy.deepcopy(network)(images), labels, label_smoothing=0.1)
    result = rule.step(network, state, images, labels, label_smoothing=0.1)
    torch.testing.assert_close(result.loss, expected.detach())


@pytest.mark.parametrize("settings", EVERY_RULE.values(), ids=EVERY_RULE)
def test_scale_multiplies_the_gradients_and_they_accumulate(settings, factored, images, labels):
    network = factored("mlp").eval()  # so that both steps see the same statistics
    rule, state = start(settings, network, images)
    rule.step(network, state, images, labels)
    once = grads(network, state)
    rule.step(network, state, images, labels, scale=2.0)
    for name, both in grads(network, state).items():
        torch.testing.assert_close(both, 3 * once[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("settings", EVERY_RULE.values(), ids=EVERY_RULE)
def test_class_probabilities_do_as_labels(settings, factored, images, labels):
    network = factored("mlp").eval()
    rule, state = start(settings, network, images)
    rule.step(network, state, images, labels)
    indexed = grads(network, state)
    network.zero_grad()
    state.zero_grad()
    rule.step(network, state, images, F.one_hot(labels, 5).float())
    for name, gradient in grads(network, state).items():
        torch.testing.assert_close(gradient, indexed[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("settings", EVERY_RULE.values(), ids=EVERY_RULE)
def test_every_rule_learns_a_handful_of_images(settings, factored, images, labels):
    network = factored("smallconv")
    rule, state = start(settings, network, images)
    parameters = [*network.parameters(), *state.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        result = rule.step(network, state, images, labels)
        optimizer.step()
    assert (result.logits.argmax(1) == labels).all()


@pytest.mark.parametrize("settings", EVERY_RULE.values(), ids=EVERY_RULE)
def test_steps_run_under_autocast_and_channels_last(settings, factored, images, labels):
    network = factored("resnet").to(memory_format=torch.channels_last)
    rule, state = start(settings, network, images)
    with torch.autocast("cpu", torch.bfloat16):
        channels_last = images.contiguous(memory_format=torch.channels_last)
        result = rule.step(network, state, channels_last, labels)
    assert torch.isfinite(result.loss)
    for gradient in grads(network, state).values():
        assert gradient.dtype == torch.float32
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("settings", EVERY_RULE.values(), ids=EVERY_RULE)
def test_a_saved_state_resumes_the_same_step(settings, factored, images, labels):
    network = factored("smallconv").eval()
    rule, state = start(settings, network, images)
    again = make_rule(settings)
    other = again.init(network, images, 5, torch.Generator().manual_seed(99))
    other.load_state_dict(state.state_dict())
    rule.step(network, state, images, labels)
    expected = grads(network, state)
    network.zero_grad()
    again.step(network, other, images, labels)
    for name, gradient in grads(network, other).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.parametrize("settings", EVERY_RULE.values(), ids=EVERY_RULE)
def test_a_network_in_float64_trains_in_float64(settings, factored, images, labels):
    losses = []
    for dtype in (torch.float32, torch.float64):
        network, x = factored("smallconv").to(dtype), images.to(dtype)
        rule, state = start(settings, network, x)
        assert {p.dtype for p in state.parameters()} <= {dtype}
        losses.append(rule.step(network, state, x, labels).loss.double())
        assert all(p.grad.isfinite().all() for p in network.parameters())
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)


def test_backprop_is_the_gradient_of_the_cross_entropy(dense, images, labels):
    network = dense("smallconv").double()
    images = images.double()
    rule, state = start(BP(), network, images)
    rule.step(network, state, images, labels, label_smoothing=0.1)
    ours = grads(network)
    network.zero_grad()
    F.cross_entropy(network(images), labels, label_smoothing=0.1).backward()
    for name, gradient in grads(network).items():
        torch.testing.assert_close(ours[name], gradient, msg=name)


def test_one_block_trained_layer_wise_is_backprop(factored, images, labels):
    network = factored("resnet20")
    local, backprop = copy.deepcopy(network), copy.deepcopy(network)
    rule, state = start(SSA(layers_per_block=99, similarity=0), local, images)
    rule.step(local, state, images, labels)
    bp, nothing = start(BP(), backprop, images)
    bp.step(backprop, nothing, images, labels)
    for name, gradient in grads(local).items():
        torch.testing.assert_close(gradient, grads(backprop)[name], msg=name)


def test_dfa_sends_the_error_through_b_and_the_activation(dense, images, labels):
    """δ = (B e) ⊙ f′, against the formula by hand on a multilayer perceptron (Nøkland 2016)."""
    network = dense("mlp").eval()
    rule, state = start(DFA(), network, images)
    rule.step(network, state, images, labels)
    x = images.flatten(1)
    layer, norm, _ = network.blocks[0]
    before = norm(layer(x))
    error = output_error(network(images).detach(), labels)
    delta = state.feedback[0][0].back(error) / 6 * (before > 0)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(layer.weight.grad, (delta * scale).T @ x)


@pytest.mark.parametrize("settings", [SSA(error="global"), DFA()], ids=["ssa", "dfa"])
def test_stored_and_recomputed_give_the_same_step(settings, factored, images, labels):
    found = {}
    for storage in ("stored", "recomputed"):
        network = factored("vit")  # with dropout
        chosen = settings.model_copy(update={"storage": storage})
        rule, state = start(chosen, network, images)
        torch.manual_seed(3)
        rule.step(network, state, images, labels)
        found[storage] = grads(network, state)
    for name, gradient in found["stored"].items():
        torch.testing.assert_close(found["recomputed"][name], gradient, msg=name)


def test_recomputing_updates_batch_norm_once(factored, images, labels):
    whole = factored("resnet20")
    whole(images)
    for storage in ("stored", "recomputed"):
        network = factored("resnet20")
        rule, state = start(DFA(storage=storage), network, images)
        rule.step(network, state, images, labels)
        for (name, ours), theirs in zip(network.named_buffers(), whole.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, msg=name)


def test_a_teacher_makes_distillation_the_loss_and_is_not_trained(dense, factored, images, labels):
    teacher, network = dense("resnet20"), factored("resnet20")
    rule, state = start(SSA(), network, images, teacher)
    assert (state.settings.distillation, state.settings.cross_entropy) == (1.0, 0.0)
    ahead = start(SSA(lookahead=2), network, images, teacher)[1].settings
    assert (ahead.distillation, ahead.cross_entropy) == (0.3, 0.0)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    rule.step(network, state, images, labels)
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not any("teacher" in name for name in state.state_dict())


def test_distillation_vanishes_for_a_copy_of_the_teacher(dense, images, labels):
    teacher = dense("resnet20").eval()
    network = copy.deepcopy(teacher)
    rule, state = start(SSA(), network, images, teacher)
    result = rule.step(network, state, images, labels)
    *blocks, _ = result.per_block.values()
    assert all(loss.item() < 1e-10 for loss in blocks)


def test_distillation_without_a_teacher_is_refused(factored, images):
    with pytest.raises(StiefelError, match="needs a teacher"):
        start(SSA(distillation=1.0), factored("mlp"), images)


def test_a_network_that_would_teach_itself_is_refused(factored, images):
    network = factored("mlp")
    with pytest.raises(StiefelError, match="shares parameters with the network"):
        start(SSA(), network, images, network)


def test_a_loss_without_terms_is_refused(factored, images):
    with pytest.raises(StiefelError, match="nothing would train"):
        start(SSA(cross_entropy=0, similarity=0), factored("mlp"), images)


def test_feedback_is_not_calibrated_on_a_single_image(factored, images):
    with pytest.raises(StiefelError, match="batch of 1 image is too small to calibrate feedback"):
        start(SSA(feedback="calibrated"), factored("smallconv"), images[:1])
    _, state = start(SSA(feedback="calibrated"), factored("smallconv"), images[:2])
    assert all(buffer.isfinite().all() for buffer in state.buffers())


def test_alignment_turns_u_towards_the_feedback(factored, images, labels):
    network = factored("smallconv")
    rule, state = start(SSA(alpha=10.0, boundaries="units"), network, images)
    layer, P = factored_layers(network)["features.4"], state.directions(1)
    assert layer.U.shape[0] == P.shape[0]

    def held() -> float:
        Q = torch.linalg.qr(layer.U.detach()).Q
        return (Q.mT @ P).square().sum().item() / P.shape[1]

    before = held()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        rule.step(network, state, images, labels)
        optimizer.step()
    assert held() > before + 0.3


def test_the_feedback_has_the_rank_of_the_layer(factored, images):
    network = factored("smallconv")
    factored_layers(network)["features.4"].truncate_(torch.arange(2))
    _, state = start(SSA(boundaries="units"), network, images)
    ranks = [modules[0].B_S.numel() for modules in state.feedback if len(modules)]
    assert ranks == [5, 2, 4]  # the first convolution is dense; five classes


@pytest.mark.parametrize("rule", [SSA, partial(SSA, readout_layers=0), DFA])
def test_feedback_that_would_be_too_large_sees_a_coarser_grid(rule, factored, images, labels):
    _, whole = start(rule(), factored("smallconv"), images)
    assert {view.grid for views in whole.views for view in views} == {4}
    network, most = factored("smallconv"), 1000
    learner, state = start(rule(readout=most), network, images)
    for modules, views in zip(state.feedback, state.views, strict=False):
        for module, view in zip(modules, views, strict=False):
            features, rank = next(iter(module.state_dict().values())).shape
            assert features == view.count == view.last.features(view.grid)
            assert view.grid == 1 or features * rank <= most
            assert view.grid == 4 or view.last.features(2 * view.grid) * rank > most
    assert min(view.grid for views in state.views for view in views) < 4
    result = learner.step(network, state, images, labels)
    assert torch.isfinite(torch.stack([*result.per_block.values()])).all()


def test_settings_are_plain_data_and_strict():
    settings = SSA(error="global", alpha=0.5)
    assert SSA.model_validate(json.loads(settings.model_dump_json())) == settings
    for wrong in ({"eror": "global"}, {"alpha": -1}, {"feedback": "random"}, {"pool": 0}):
        with pytest.raises(ValidationError):
            SSA(**wrong)
    assert all(field.description for rule in (SSA, DFA, BP) for field in rule.model_fields.values())
