"""Checkpoints from the wild: every usual shape loads the same weights; the rest is refused."""

import argparse

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from converter.errors import StiefelError
from converter.state_dicts import load_state, read_state
from tests.converter.weights import Tied, network, refusal, same, weights


def prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in state.items()}


def misfit(model, state, **options) -> str:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(StiefelError) as caught:
        load_state(model, state, **options)
    assert same(model.state_dict(), before), "a refused checkpoint must not change the model"
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Nestings


@pytest.mark.parametrize("container", ["state_dict", "model", "model_state_dict", "module", "net"])
def test_weights_are_found_in_their_container_and_the_rest_is_noted(tmp_path, container):
    state = weights()
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({container: state, "epoch": 3, "optimizer": optimizer}, tmp_path / "c.pt")
    notes = []
    assert same(read_state(tmp_path / "c.pt", note=notes.append), state)
    assert len(notes) == 1
    assert "epoch" in notes[0]
    assert "optimizer" in notes[0]


@pytest.mark.parametrize("new_zip", [True, False])
def test_bare_weights_load_from_both_of_torchs_file_formats(tmp_path, new_zip):
    state = weights()
    torch.save(state, tmp_path / "c.pth", _use_new_zipfile_serialization=new_zip)
    assert same(read_state(tmp_path / "c.pth", note=pytest.fail), state)


def test_a_best_accuracy_saved_as_a_tensor_is_no_weight(tmp_path):
    state = weights()
    torch.save({"state_dict": state, "best": torch.tensor(0.9)}, tmp_path / "c.pt")
    notes = []
    assert same(read_state(tmp_path / "c.pt", note=notes.append), state)
    assert "best" in notes[0]


def test_the_plain_weights_are_taken_unless_the_average_is_named(tmp_path):
    plain, average = weights(), weights()
    torch.save({"state_dict_ema": average, "state_dict": plain}, tmp_path / "c.pt")
    notes = []
    assert same(read_state(tmp_path / "c.pt", note=notes.append), plain)
    assert "state_dict_ema" in notes[0]
    for variant in ("ema", "EMA", "state_dict_ema"):
        assert same(read_state(tmp_path / "c.pt", variant=variant), average)


def test_a_lone_average_is_taken(tmp_path):
    average = weights()
    torch.save({"model_ema": average}, tmp_path / "c.pt")
    assert same(read_state(tmp_path / "c.pt", note=pytest.fail), average)


def test_deeper_nesting_is_followed(tmp_path):
    state = weights()
    torch.save({"checkpoint": {"model": {"state_dict": state}}, "step": 1}, tmp_path / "c.pt")
    assert same(read_state(tmp_path / "c.pt", note=lambda _: None), state)


def test_an_unknown_or_ambiguous_variant_lists_what_there_is(tmp_path):
    torch.save({"model_a": weights(), "model_b": weights()}, tmp_path / "c.pt")
    assert "model_a, model_b" in refusal(tmp_path / "c.pt")
    assert "several weights named 'model'" in refusal(tmp_path / "c.pt", variant="model")
    text = refusal(tmp_path / "c.pt", variant="ema")
    assert "no weights named 'ema'" in text
    assert "model_a" in text


def test_harmless_training_state_does_not_spoil_a_checkpoint(tmp_path):
    state = weights()
    extra = {"args": argparse.Namespace(lr=0.1), "best": np.float64(0.5), "curve": np.ones(3)}
    torch.save({"model": state, **extra}, tmp_path / "c.pt")
    assert same(read_state(tmp_path / "c.pt", note=lambda _: None), state)


def test_without_a_listener_notes_are_warnings(tmp_path):
    torch.save({"state_dict": weights(), "epoch": 3}, tmp_path / "c.pt")
    with pytest.warns(UserWarning, match="epoch"):
        read_state(tmp_path / "c.pt")


# Fitting


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "module.module."]
)
def test_wrappers_prefixes_are_removed(prefix):
    model, state = network(), weights()
    load_state(model, prefixed(prefix, state), note=pytest.fail)
    assert same(model.state_dict(), state)


def test_a_compiled_child_loads_too():
    model, state = network(), weights()
    load_state(model, {key.replace("conv.", "conv._orig_mod."): v for key, v in state.items()})
    assert same(model.state_dict(), state)


def test_a_module_that_is_really_called_module_keeps_its_name():
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    state = {key: torch.ones_like(value) for key, value in model.state_dict().items()}
    load_state(model, state)
    assert same(model.state_dict(), state)


def test_averaged_models_of_torch_load_without_their_counter():
    averaged = torch.optim.swa_utils.AveragedModel(network())
    model = network()
    load_state(model, averaged.state_dict(), note=pytest.fail)
    assert same(model.state_dict(), averaged.module.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_converted_with_a_note(dtype):
    model, state = network(), weights()
    notes = []
    halves = {key: v.to(dtype) if v.is_floating_point() else v for key, v in state.items()}
    load_state(model, halves, note=notes.append)
    assert model.conv.weight.dtype == torch.float32
    assert torch.equal(model.conv.weight, halves["conv.weight"].float())
    assert str(dtype).removeprefix("torch.") in notes[0]


def test_values_that_are_not_finite_are_noted():
    state, notes = weights(), []
    state["conv.weight"][0] = torch.nan
    load_state(network(), state, note=notes.append)
    assert "conv.weight" in notes[0]


def test_renames_apply_in_order_and_may_drop_keys():
    model, state = network(), weights()
    wild = {key.replace("conv.", "backbone.stem.conv."): v for key, v in state.items()}
    wild["decoder.weight"] = torch.zeros(2)
    rules = [r"^backbone\.=", r"^(?:stem)\.=", r"^decoder\..*="]
    load_state(model, wild, rename=rules, note=pytest.fail)
    assert same(model.state_dict(), state)


def test_renames_may_look_ahead_and_use_groups():
    model, state = network(), weights()
    wild = {key.replace("head.", "fc1.head."): v for key, v in state.items()}
    load_state(model, wild, rename=[r"fc(?=\d)\d\.(\w+)=\1"])
    assert same(model.state_dict(), state)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("conv", "must be written"),
        ("=x", "must be written"),
        ("(=x", "no regular expression"),
        ("^.*=x", "two tensors the name 'x'"),
        (r"conv=\9", "no regular expression"),
    ],
)
def test_a_malformed_rename_is_named(rule, words):
    assert words in misfit(network(), weights(), rename=[rule])


def test_a_rename_that_changes_nothing_is_noted():
    notes = []
    load_state(network(), weights(), rename=["nothing=x"], note=notes.append)
    assert "nothing=x" in notes[0]


def test_missing_and_unexpected_keys_are_listed_with_the_nearest():
    state = weights()
    state["convolution.weight"] = state.pop("conv.weight")
    text = misfit(network(), state)
    assert "1 missing: conv.weight (the file has convolution.weight)" in text
    assert "1 unexpected: convolution.weight" in text


def test_only_the_first_few_keys_are_listed_and_the_rest_counted():
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(20)])
    text = misfit(model, {})
    assert "40 missing" in text
    assert "and 37 more" in text
    assert len(text) < 300


def test_a_common_prefix_is_suggested_as_a_rename_that_works():
    model, state = network(), weights()
    text = misfit(model, prefixed("backbone.", state))
    rule = text.rpartition("with rename '")[2].removesuffix("'")
    load_state(model, prefixed("backbone.", state), rename=[rule])
    assert same(model.state_dict(), state)


def test_another_number_of_classes_is_recognised():
    state = weights()
    state["head.weight"], state["head.bias"] = torch.zeros(7, 4), torch.zeros(7)
    text = misfit(network(), state)
    assert "head.weight is (7, 4) in the file, (3, 4) in the model" in text
    assert "num_classes=7" in text


def test_another_kernel_is_not_taken_for_a_classifier():
    state = weights()
    state["conv.weight"] = torch.zeros(4, 1, 5, 5)
    text = misfit(network(), state)
    assert "(4, 1, 5, 5)" in text
    assert "num_classes" not in text


def test_old_checkpoints_that_count_no_batches_load():
    state = {key: v for key, v in weights().items() if not key.endswith("num_batches_tracked")}
    model = network()
    load_state(model, state, note=pytest.fail)
    assert torch.equal(model.conv.weight, state["conv.weight"])


def test_a_tied_tensor_may_be_there_under_one_of_its_names():
    model = Tied()
    load_state(model, {"head.weight": torch.ones(4, 3)})
    assert torch.equal(model.embedding.weight, torch.ones(4, 3))
    assert model.embedding.weight is model.head.weight


def test_counters_of_flop_profilers_are_no_weights():
    state = weights() | {"total_ops": torch.zeros(1), "conv.total_params": torch.zeros(1)}
    load_state(network(), state)


@given(
    missing=st.sets(st.sampled_from(sorted(weights())), max_size=3),
    added=st.sets(st.text("abc.", min_size=1, max_size=6), max_size=3),
)
def test_a_checkpoint_loads_if_and_only_if_its_keys_are_the_models(missing, added):
    state = {key: value for key, value in weights().items() if key not in missing}
    state |= {key: torch.zeros(1) for key in added}
    model = network()
    needed = {key for key in missing if not key.endswith("num_batches_tracked")}
    if needed or added:
        misfit(model, state, note=lambda _: None)
    else:
        load_state(model, state)
        assert torch.equal(model.conv.weight, state["conv.weight"])


def test_the_published_residual_networks_load_as_they_are(shared_data):
    from converter.models import load

    for depth, file in ((32, "resnet32-d509ac18.th"), (56, "resnet56-4bfd9763.th")):
        notes = []
        model = load(f"zoo:resnet{depth}", checkpoint=shared_data / file, note=notes.append)
        saved = torch.load(shared_data / file, weights_only=True, map_location="cpu")
        key = "module.layer3.0.conv2.weight"
        assert torch.equal(model.layer3[0].conv2.weight, saved["state_dict"][key])
        assert len(notes) == 1
        assert "best_prec1" in notes[0]
