"""Models by name: what is built, what it expects, and what is said when the name is wrong."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from converter.errors import StiefelError
from converter.models import InputSpec, ModelSpec, load, parse_args, parse_shape, rebuild, spec_of
from converter.specs import InputChange

FACTORY = """
from torch import nn
from neighbour import WIDTH

def make(num_classes=3, width=WIDTH):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.Linear(width, num_classes))

def broken():
    raise ValueError("the disk\\nis on fire")

def number():
    return 3

CONSTANT = 4
"""


@pytest.fixture
def factory_file(tmp_path):
    (tmp_path / "neighbour.py").write_text("WIDTH = 5\n")
    file = tmp_path / "nets.py"
    file.write_text(FACTORY)
    return file


def complaint(name: str, **options) -> str:
    with pytest.raises(StiefelError) as caught:
        load(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_zoo_model_knows_its_name_input_and_classes():
    model = load("zoo:digits", args={"num_classes": 4})
    spec = spec_of(model)
    assert spec.name == "zoo:digits"
    assert spec.args == {"num_classes": 4}
    assert spec.num_classes == 4
    assert spec.input == InputSpec(shape=(1, 8, 8), mean=(0.0,), std=(1.0,))
    assert not model.training


def test_an_input_of_the_users_own_replaces_the_default():
    own = InputSpec(shape=(3, 64, 64), mean=(0.5,) * 3, std=(0.5,) * 3)
    assert spec_of(load("zoo:resnet20", input=own)).input == own


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"interpolation": "bicubic"}, {"interpolation": "bicubic"}),
        ({"mean": (0.5, 0.5, 0.5)}, {"mean": (0.5, 0.5, 0.5)}),
        ({"shape": (3, 64, 64)}, {"shape": (3, 64, 64), "resize": None}),
        ({"shape": (3, 224, 224)}, {}),
        ({}, {}),
    ],
)
def test_of_an_input_only_what_is_named_changes(change, differs):
    own = spec_of(load("torchvision:mobilenet_v3_small")).input
    found = spec_of(load("torchvision:mobilenet_v3_small", input=InputChange(**change))).input
    assert found == InputSpec(**dict(own) | differs)


def test_a_change_that_does_not_fit_what_stays_is_refused():
    text = complaint("zoo:resnet20", input=InputChange(mean=(0.5,)))
    assert "mean has 1 values for 3 channels" in text


def test_torchvision_models_expect_what_their_published_weights_do():
    expected = spec_of(load("torchvision:mobilenet_v3_small", args={"num_classes": 5}))
    assert expected.input.shape == (3, 224, 224)
    assert expected.input.resize == 256
    assert expected.input.mean == (0.485, 0.456, 0.406)
    assert expected.num_classes == 5


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_classifiers_are_left_out_so_that_training_gives_plain_logits(name):
    model = load(f"torchvision:{name}", args={"num_classes": 3})
    spec = spec_of(model)
    x = torch.randn(2, *spec.input.shape)
    assert model.train()(x).shape == (2, 3)
    assert spec.args["aux_logits"] is False


def test_auxiliary_weights_in_a_checkpoint_are_left_out_with_a_note(tmp_path):
    import torchvision

    full = torchvision.models.googlenet(num_classes=3, init_weights=False)
    torch.save(full.state_dict(), tmp_path / "full.pth")
    notes = []
    model = load(
        "torchvision:googlenet",
        checkpoint=tmp_path / "full.pth",
        args={"num_classes": 3},
        note=notes.append,
    )
    assert torch.equal(model.fc.weight, full.fc.weight)
    assert any("aux1" in note for note in notes)
    assert any("transform_input" in note for note in notes)


def test_timm_models_expect_what_timm_says():
    pytest.importorskip("timm")
    spec = spec_of(
        load("timm:vit_tiny_patch16_224", args={"img_size": 32, "num_classes": 6, "in_chans": 1})
    )
    assert spec.input.shape == (1, 32, 32)
    assert spec.num_classes == 6
    assert spec.input.mean == (0.5,)


def test_a_factory_in_a_file_may_import_its_neighbours(factory_file):
    small = InputSpec.plain((3, 2, 2))
    model = load(f"{factory_file}:make", args={"num_classes": 4}, input=small)
    assert model(torch.zeros(1, 3, 2, 2)).shape == (1, 4)
    assert model[1].out_features == 5


def test_a_factory_named_by_a_relative_path_is_found_from_elsewhere(factory_file, monkeypatch):
    monkeypatch.chdir(factory_file.parent)
    spec = spec_of(load("nets.py:make", input=InputSpec.plain((3, 2, 2))))
    monkeypatch.chdir("/")
    assert rebuild(spec)(torch.zeros(1, 3, 2, 2)).shape == (1, 3)


def test_an_edited_factory_is_read_anew(factory_file):
    small = InputSpec.plain((3, 2, 2))
    load(f"{factory_file}:make", input=small)
    factory_file.write_text(FACTORY.replace("num_classes=3", "num_classes=31"))
    assert spec_of(load(f"{factory_file}:make", input=small)).num_classes == 31


def test_a_class_in_a_package_is_a_factory():
    spec = spec_of(load("converter.zoo:MLP", input=InputSpec.natural((3, 32, 32))))
    assert spec.name == "converter.zoo:MLP"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("zoo:resnet23", "did you mean resnet"),
        ("torchvision:resnet19", "did you mean resnet18"),
        ("resnet18", "torchvision:resnet18"),
        ("tim:resnet18", "did you mean timm"),
        ("missing.py:make", "there is no file"),
        ("no_such_package.nets:make", "no module 'no_such_package'"),
        ("converter.zoo:ML", "did you mean MLP"),
        ("converter.zoo:", "names no factory"),
    ],
)
def test_a_wrong_name_is_named_with_the_nearest_right_one(name, words):
    assert words in complaint(name)


def test_an_unknown_timm_model_is_named_with_the_nearest():
    pytest.importorskip("timm")
    assert "did you mean resnet18" in complaint("timm:resnt18")


def test_a_wrong_argument_is_named_with_the_nearest():
    assert "did you mean num_classes" in complaint("zoo:digits", args={"num_clases": 3})


def test_arguments_that_no_checkpoint_could_repeat_are_refused():
    text = complaint("zoo:digits", args={"num_classes": torch.zeros(1)})
    assert "num_classes" in text
    assert "plain data" in text


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("broken", "the disk is on fire"),
        ("number", "returned a int"),
        ("mak", "did you mean make"),
        ("CONSTANT", "not a function"),
    ],
)
def test_a_factory_that_fails_is_one_line(factory_file, factory, words):
    assert words in complaint(f"{factory_file}:{factory}")


def test_an_input_that_the_model_cannot_run_on_is_named():
    text = complaint("zoo:digits", input=InputSpec.natural((3, 32, 32)))
    assert "3x32x32" in text


def test_weights_and_checkpoint_exclude_each_other():
    assert "not both" in complaint("zoo:digits", checkpoint="x.pt", weights="DEFAULT")


def test_unknown_published_weights_are_named():
    assert "IMAGENET1K_V1" in complaint("torchvision:resnet18", weights="IMAGENET9K")


def test_rebuilding_makes_the_same_architecture_and_draws_no_random_numbers():
    model = load("zoo:smallconv", args={"num_classes": 3})
    before = torch.get_rng_state()
    again = rebuild(spec_of(model))
    assert torch.equal(torch.get_rng_state(), before)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in again.state_dict().items()} == shapes
    assert spec_of(again) == spec_of(model)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("os:system", {"command": "touch {marker}"}),
        ("subprocess:call", {"args": ["touch", "{marker}"]}),
        ("torch.hub:load", {"repo_or_dir": "{marker}", "model": "x", "source": "local"}),
    ],
)
def test_a_checkpoint_may_not_name_what_is_no_model(tmp_path, name, args):
    marker = tmp_path / "marker"
    args = json.loads(json.dumps(args).replace("{marker}", str(marker)))
    with pytest.raises(StiefelError, match="isn't evidently a model"):
        rebuild(ModelSpec(name=name, args=args, num_classes=2))
    assert not marker.exists()


def test_a_users_file_does_not_lend_its_imports_to_a_checkpoint(tmp_path):
    file = tmp_path / "nets.py"
    file.write_text("import subprocess\n")
    spec = ModelSpec(name=f"{file}:subprocess.call", args={"args": ["true"]}, num_classes=2)
    with pytest.raises(StiefelError, match="isn't evidently a model"):
        rebuild(spec)


def test_a_name_that_the_user_repeats_is_trusted(factory_file):
    spec = ModelSpec(name="os:system", args={}, input=InputSpec.plain((3, 2, 2)), num_classes=3)
    model = rebuild(spec, trusted=f"{factory_file}:make")
    assert spec_of(model).name == f"{factory_file}:make"


def test_arguments_are_read_as_yaml():
    pairs = ["a=3", "b=0.5", "c=1e-3", "d=true", "e=[1, 2]", "f=text", "g=", "h=x=y"]
    assert parse_args(pairs) == {
        **{"a": 3, "b": 0.5, "c": 1e-3, "d": True, "e": [1, 2], "f": "text", "g": None},
        "h": "x=y",
    }


@pytest.mark.parametrize("pair", ["width", "=3", "wi dth=3", "a=[1"])
def test_a_malformed_argument_is_named(pair):
    with pytest.raises(StiefelError, match="model argument"):
        parse_args([pair])


@given(st.tuples(*[st.integers(1, 9999)] * 3))
def test_shapes_are_read_back(shape):
    assert parse_shape("x".join(map(str, shape))) == shape


@pytest.mark.parametrize("text", ["", "3x32", "3x32x32x1", "3x0x32", "3x-1x2", "axbxc"])
def test_a_malformed_shape_is_named(text):
    with pytest.raises(StiefelError, match="no image shape"):
        parse_shape(text)


@pytest.mark.parametrize("written", ["1x8x8", ("1x8x8",), ("1", "8", "8"), [1, 8, 8]])
def test_an_input_s_shape_may_be_written_as_shapes_are_elsewhere(written):
    assert InputChange(shape=written).shape == (1, 8, 8)
    with pytest.raises(ValueError, match="'1x8' is no image shape; write CxHxW"):
        InputChange(shape=("1x8",))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_torchscript_is_refused_by_its_place(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(
        "import torch\n"
        "from torch import nn\n"
        "def whole():\n"
        "    return torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))\n"
        "def part():\n"
        "    return nn.Sequential(nn.Flatten(), torch.jit.script(nn.Linear(4, 2)))\n"
    )
    for factory, where in (("whole", "it is"), ("part", "its part 1 is")):
        text = complaint(f"{path}:{factory}", input=InputSpec.plain((1, 2, 2)))
        assert f"{where} TorchScript; give the module as it was" in text


def test_an_input_needs_a_mean_and_deviation_for_each_channel():
    with pytest.raises(ValueError, match="one each"):
        InputSpec(shape=(1, 8, 8))
    with pytest.raises(ValueError, match="positive"):
        InputSpec(shape=(1, 8, 8), mean=(0.0,), std=(0.0,))


def test_loading_leaves_pythons_module_search_path_alone(factory_file):
    import sys

    before = list(sys.path)
    load(f"{factory_file}:make", input=InputSpec.plain((3, 2, 2)))
    assert sys.path == before
