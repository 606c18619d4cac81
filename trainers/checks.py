"""What can be found wrong with data and network before anything is trained, one clear line each."""

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.data import Dataset

from converter.errors import StiefelError
from converter.factors import factored_layers
from converter.layers import check_values
from converter.specs import spec_of
from trainers.data import Data, epoch_order, examples
from trainers.image_set import reading
from trainers.labels import as_indices, known_labels
from trainers.manifold import tied_layers
from trainers.rules import SSA, RuleSettings
from trainers.trial import try_out


def check_data(data: Data) -> None:
    """Refuse data that nothing can be learned from.

    Raises:
        StiefelError: no images, one class only, or labels outside the classes.
    """
    for part, dataset in (("training", data.train), ("test", data.test)):
        if len(dataset) == 0:
            raise StiefelError(f"{data.name} has no {part} images")
        with reading():
            labels = known_labels(dataset)
            if labels is None:
                labels = torch.as_tensor(dataset[0][1])[None]
        check_labels(labels, len(data.classes), f"{data.name}, {part} images")
    if not _several_classes(data.train):
        raise StiefelError(f"{data.name} has training images of one class only; two are needed")


def _several_classes(dataset: Dataset) -> bool:
    labels = known_labels(dataset)
    if labels is not None:
        return len(labels.unique()) > 1
    # In a random order a second class is soon met, where there is one.
    with reading():
        first, *rest = epoch_order(len(dataset), 0, 0).tolist()
        one = int(dataset[first][1])
        return any(int(dataset[index][1]) != one for index in rest)


def check_labels(labels: Tensor, classes: int, where: str) -> None:
    """Refuse labels (N,) that are no whole numbers from 0 to `classes` − 1.

    Raises:
        StiefelError: names the first label that isn't.
    """
    labels = as_indices(labels, where)
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise StiefelError(
            f"{where}: label {int(outside[0])} is outside the {classes} classes 0 … {classes - 1}"
        )


def count_outputs(network: nn.Module, example: Tensor, data: Data) -> int:
    """The width of the network's output for this example (N, C, H, W), which changes nothing.

    Raises:
        StiefelError: the images don't fit the network, or the classes don't fit its output.
    """
    shape = tuple(example.shape[1:])
    spec = spec_of(network)
    if spec is not None and spec.input.shape != shape:
        raise StiefelError(
            f"{data.name} has images {_x(shape)}, {spec.name} {_x(spec.input.shape)}"
        )
    output = try_out(network, example)
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(example):
        raise StiefelError("the network is no classifier: it should return logits (N, classes)")
    if len(data.classes) > output.shape[1]:
        raise StiefelError(
            f"{data.name} has {len(data.classes)} classes, the network tells {output.shape[1]} "
            "apart; give the model argument num_classes"
        )
    return output.shape[1]


def check_test_images(network: nn.Module, example: Tensor, data: Data) -> None:
    """Refuse test images of another shape than the training images (N, C, H, W) if they don't fit.

    Raises:
        StiefelError: the network can't take them; one of them was tried.
    """
    image = examples(data.test, 1)[0].to(example)
    if image.shape[1:] != example.shape[1:]:
        shape = _x(example.shape[1:])
        who = f"{data.name} has training images {shape} and other test images: the network"
        try_out(network, image, who)


def check_parts(batch_size: int, shares: int) -> None:
    """Refuse a batch that can't be split into `shares` equal parts.

    Raises:
        StiefelError: names the next larger batch that can.
    """
    if batch_size % shares:
        raise StiefelError(
            f"batch_size {batch_size} can't be split into {shares} equal parts (accumulate × "
            f"processes); {shares * (batch_size // shares + 1)} can"
        )


def count_part(images: int, batch_size: int, shares: int) -> int:
    """Images to one forward pass, where each batch is split into `shares` equal parts.

    Raises:
        StiefelError: it can't be.
    """
    check_parts(batch_size, shares)
    part = min(batch_size, images) // shares
    if part == 0:
        raise StiefelError(
            f"{images} training images can't be split into {shares} equal parts (accumulate × "
            "processes)"
        )
    return part


def check_factored(network: nn.Module, rule: RuleSettings) -> None:
    """Refuse to align what isn't factored.

    Raises:
        StiefelError: the rule is SSA and no layer is factored.
    """
    if isinstance(rule, SSA) and not factored_layers(network):
        raise StiefelError(
            "the model has no factored layer to train with rule ssa; convert it first, or use "
            "rule bp or dfa"
        )


def check_plain(network: nn.Module) -> None:
    """Refuse a module around the network that runs it in its own way.

    Raises:
        StiefelError: says what to give instead.
    """
    inner = "module" if isinstance(network, (DataParallel, DistributedDataParallel)) else None
    inner = "_orig_mod" if hasattr(network, "_orig_mod") else inner
    if inner is not None:
        raise StiefelError(
            f"the model is wrapped in {type(network).__name__}: give what is inside, model.{inner}"
        )


def check_trainable(network: nn.Module) -> None:
    """Refuse a network that is frozen throughout, or not built yet.

    Raises:
        StiefelError: no parameter requires gradients, or one holds no values.
    """
    check_values(network, "training")
    if not any(p.requires_grad for p in network.parameters()):
        raise StiefelError("nothing to train: every parameter of the model is frozen")


def check_precision(network: nn.Module, images: Tensor) -> None:
    """Refuse weights too coarse to train, and images (N, C, H, W) of a dtype that no weight has.

    Raises:
        StiefelError: names both dtypes.
    """
    weights = [p for p in network.parameters() if p.is_floating_point()]
    dtypes = {p.dtype for p in weights}
    coarse = {p.dtype for p in weights if p.requires_grad and p.element_size() < 4}
    if wrong := coarse or (images.dtype not in dtypes and dtypes):
        dtype = wrong.pop()
        names = [str(dtype).removeprefix("torch.") for dtype in (dtype, images.dtype)]
        remedy = "model.float(), then store it again"
        if dtype == torch.float32:
            remedy = "image.float() in the data set"
        raise StiefelError(
            f"the network's weights are {names[0]}, the images {names[1]}: training takes both in "
            f"float32 ({remedy})"
        )


def check_ties(network: nn.Module) -> None:
    """Refuse layers of which some factors are shared: the rank of none can fall alone.

    Raises:
        StiefelError: names two layers that share one or two of U, S and V.
    """
    owners: dict[int, str] = {}
    for name, (layer, *_) in tied_layers(network).items():
        for factor in layer.factors():
            if (owner := owners.setdefault(id(factor), name)) != name:
                raise StiefelError(
                    f"ranks: layers {owner} and {name} share some of U, S and V, so neither's rank "
                    "can fall: let them share all three or none, or leave ranks out"
                )


def check_batch_norm(network: nn.Module, images: int) -> None:
    """Refuse batch statistics of a single image.

    Args:
        images: in one forward pass, of all processes that share their statistics.

    Raises:
        StiefelError: there is one, and the network has batch norms.
    """
    norms = [
        n for n, m in network.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]
    if images == 1 and norms:
        raise StiefelError(
            f"a batch of 1 image is too small for batch norm ({norms[0]}); give a larger "
            "batch_size, or batch_norm frozen"
        )


def name_of_nonfinite(network: nn.Module, state: nn.Module) -> str | None:
    """The first parameter that isn't finite, or None; one look at the device."""
    named = [*network.named_parameters(), *state.named_parameters("the rule's")]
    if not named:
        return None
    norms = torch._foreach_norm([p.detach() for _, p in named], float("inf"))
    finite = torch.stack([norm.float() for norm in norms]).isfinite().tolist()
    return next((name for (name, _), ok in zip(named, finite, strict=True) if not ok), None)


def _x(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
