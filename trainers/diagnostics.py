"""What training is like inside: how far local updates point where backpropagation's would.

For each layer, on one batch that stays the same: the angle between the gradient that the rule gives
it and the gradient that backpropagation would; how far its factors are from orthonormal; its rank.
For each block: how well its features tell the classes apart, by the rule's own read-out and by a
linear probe that is fitted to them, which is the same measure for every rule.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from converter.errors import StiefelError
from converter.factors import Factored
from trainers.cuts import Cuts, CutSettings, cut
from trainers.data import Data, examples
from trainers.feedback import DenseFeedback, fitted_factors
from trainers.looking import in_mode, undisturbed
from trainers.manifold import departure
from trainers.rules import BP, Rule, make_rule

# The probes' images: as many as these bytes hold, but no more than this, nor fewer than a batch.
_PROBE_BYTES, _PROBE_IMAGES = 2**26, 1000
_CHUNK = 128
_POOL = 4

Labelled = tuple[Tensor, Tensor]


class Diagnostics:
    """Looks at a network in training, and leaves it and the random state as they were.

    Gradients are taken in training mode and float32, and left cleared. They need the memory of
    backpropagation.

    Args:
        network: the network in training, on its device.
        rule: what trains it.
        state: the rule's.
        data: training images, unaugmented, give the gradients and fit the probes; test images
            give the accuracies.
        images: to the batch of the gradients.
        seed: of the choice of images, and of dropout.
        label_smoothing: as in training.
    """

    def __init__(
        self,
        network: nn.Module,
        rule: Rule,
        state: nn.Module,
        data: Data,
        *,
        images: int,
        seed: int,
        label_smoothing: float = 0.0,
    ) -> None:
        self.network, self.rule, self.state = network, rule, state
        self.seed, self.label_smoothing = seed, label_smoothing
        with _without_trace(network, state):
            self.batch = self._drawn(data.train, images, seed)
            size = 4 * math.prod(self.batch[0].shape[1:])
            count = max(images, min(_PROBE_IMAGES, _PROBE_BYTES // size))
            self.fit, self.test = (
                self._drawn(part, count, seed) for part in (data.train, data.test)
            )
            self.cuts = self._cuts()

    def __call__(self) -> dict[str, Any]:
        """Look.

        Returns:
            Plain data: `layers`, name → rank, departure, cosine, angle_deg, factor_cosines and
            norm_ratio (each None where either gradient is zero); `blocks`, name → loss and
            read-outs; `images`, on which the gradients were taken; `test_images`.
        """
        local, losses = self._gradients(self.rule, self.state)
        true, _ = self._gradients(make_rule(BP()), nn.Module())
        layers = {
            name: _compare(module, local[name], true[name])
            for name, module in weighted_modules(self.network).items()
        }
        accuracies = {} if self.cuts is None else self._accuracies(self.cuts)
        blocks = {
            name: {"loss": losses.get(name), "readouts": found}
            for name, found in accuracies.items()
        }
        counts = {"images": len(self.batch[1]), "test_images": len(self.test[1])}
        return {"layers": layers, "blocks": blocks, **counts}

    def _gradients(
        self, rule: Rule, state: nn.Module
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
        """Each weighted module's gradients by parameter name, and each block's loss."""
        x, y = self._on_device(self.batch)
        with _without_trace(self.network, self.state):
            torch.manual_seed(self.seed)  # both rules meet the same dropout
            result = rule.step(self.network, state, x, y, label_smoothing=self.label_smoothing)
            found = {
                name: {
                    leaf: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                    for leaf, p in _weights(module).items()
                }
                for name, module in weighted_modules(self.network).items()
            }
        return found, {name: float(loss) for name, loss in result.per_block.items()}

    def _accuracies(self, cuts: Cuts) -> dict[str, dict[str, dict[str, float | None]]]:
        """Block → root → accuracy on the test images of the read-out and of a linear probe."""
        fit, test = (self._features(cuts, images) for images in (self.fit, self.test))
        labels = self.test[1]
        accuracies: dict[str, dict[str, dict[str, float | None]]] = {}
        for block in cuts.blocks:
            mine = accuracies.setdefault(block.name, {})
            for root in block.roots:
                _, readout = test[root.name]
                mine[root.name] = {
                    "readout_accuracy": None if readout is None else _accuracy(readout, labels),
                    "probe_accuracy": self._probe(fit[root.name][0], test[root.name][0]),
                }
        return accuracies

    def _features(self, cuts: Cuts, images: Labelled) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Root → pooled features (N, D) and the read-out's logits (N, C), on the CPU."""
        found: dict[str, list[tuple[Tensor, Tensor | None]]] = {}
        feedback = getattr(self.state, "feedback", [])
        trained = getattr(getattr(self.state, "settings", None), "cross_entropy", 1)

        def visit(index: int, roots: tuple[Tensor, ...], logits: Tensor | None) -> None:
            mine = feedback[index] if index < len(feedback) else []
            seen = self.state.features(index, roots) if len(mine) else []
            for place, (root, h) in enumerate(zip(cuts.blocks[index].roots, roots, strict=True)):
                z = root.pooled(h, _POOL)
                read = logits
                if len(mine):
                    read = _read_out(mine[place], seen[place]) if trained else None
                pair = z.float().cpu(), None if read is None else read.float().cpu()
                found.setdefault(root.name, []).append(pair)

        no_trace = _without_trace(self.network, self.state)
        with no_trace, in_mode(self.network, False), torch.no_grad():
            # Alike in size: read-outs' norms go by the images in hand.
            for chunk in images[0].tensor_split(math.ceil(len(images[0]) / _CHUNK)):
                cuts.run(chunk.to(self._device), visit)
        return {
            name: (
                torch.cat([z for z, _ in pairs]),
                None if pairs[0][1] is None else torch.cat([read for _, read in pairs]),
            )
            for name, pairs in found.items()
        }

    def _probe(self, fit: Tensor, test: Tensor) -> float:
        """Test accuracy of a ridge regression of the labels on standardised features (N, D)."""
        labels = self.fit[1]
        classes = int(max(labels.max(), self.test[1].max())) + 1
        scale = fit.std(dim=0).clamp_min(1e-6)
        factors, bias = fitted_factors(fit / scale, F.one_hot(labels, classes).float(), classes)
        return _accuracy(test / scale @ factors.matrix() + bias, self.test[1])

    def _cuts(self) -> Cuts | None:
        """The rule's own blocks, or for backpropagation those that a local rule would have."""
        if (cuts := getattr(self.state, "cuts", None)) is not None:
            return cuts
        try:
            return cut(self.network, self.batch[0].to(self._device), CutSettings())
        except StiefelError:  # it can't be traced, and backpropagation need not
            return None

    def _drawn(self, dataset: Any, count: int, seed: int) -> Labelled:
        return examples(dataset, min(count, len(dataset)), seed)

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device

    def _on_device(self, images: Labelled) -> Labelled:
        return images[0].to(self._device), images[1].to(self._device)


def weighted_modules(network: nn.Module) -> dict[str, nn.Module]:
    """The modules that own factors or a weight matrix or kernel, each once, by name."""
    return {name: module for name, module in network.named_modules() if _weights(module)}


def cosine(one: dict[str, Tensor], other: dict[str, Tensor]) -> float | None:
    """Cosine of two gradients, each in parts by parameter; None where either is zero."""
    product = sum(float((one[k].double() * other[k].double()).sum()) for k in one)
    norms = norm(one) * norm(other)
    return max(-1.0, min(1.0, product / norms)) if norms else None


def norm(gradient: dict[str, Tensor]) -> float:
    """Of a gradient in parts."""
    return math.sqrt(sum(float(part.double().square().sum()) for part in gradient.values()))


def _compare(
    module: nn.Module, local: dict[str, Tensor], true: dict[str, Tensor]
) -> dict[str, Any]:
    """One layer's line."""
    alike = cosine(local, true)
    line = {
        "cosine": alike,
        "angle_deg": None if alike is None else math.degrees(math.acos(alike)),
        "factor_cosines": {k: cosine({k: local[k]}, {k: true[k]}) for k in local},
        "norm_ratio": norm(local) / norm(true) if norm(true) else None,
    }
    if isinstance(module, Factored):
        worst = max(float(departure(f.detach()).max()) for f in (module.U, module.V))
        line |= {"rank": module.rank, "departure": worst}
    return line


def _weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """A layer's own U, S and V, or its weight matrices; biases and norms are left out."""
    if isinstance(module, Factored):
        return dict(zip("USV", module.factors(), strict=True))
    own = module.named_parameters(recurse=False)
    return {name: p for name, p in own if name.endswith("weight") and p.ndim >= 2}


def _read_out(feedback: nn.Module, z: Tensor) -> Tensor | None:
    """Logits (N, C) that z (N, D) is read out to, or None where feedback goes one way only."""
    one_way = isinstance(feedback, DenseFeedback) or getattr(feedback, "read", z) is None
    return None if one_way else feedback(z)


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())


@contextmanager
def _without_trace(network: nn.Module, state: nn.Module) -> Iterator[None]:
    """Afterwards buffers and random numbers are as they were, and gradients are cleared."""
    with undisturbed(network, state):
        try:
            yield
        finally:
            network.zero_grad()
            state.zero_grad()
