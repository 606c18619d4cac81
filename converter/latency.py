"""Measured time: of a model, of each layer dense, and of each layer at every rank on offer.

What is timed is what inference runs: batch norm that folds into the layer before it is left out,
and a factored layer is two plain ones.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from converter.cost import Call, inference
from converter.decompose import Factors
from converter.factors import Factored, FactoredLinear
from converter.folding import without_folded_norms
from converter.layers import Layer, find_layers, install, prepared

MULTIPLE = {"cpu": 8, "cuda": 16}  # vector width and tensor-core tile; other ranks waste lanes
STEP = 1.2  # the ranks on offer lie about so far apart
LEAST_SECONDS, LEAST_RUNS = 0.02, 5  # a layer is timed so long, so often, at least
MODEL_SECONDS, MODEL_RUNS = 4.0, 15  # a whole model, by which a plan is judged
MOST_SECONDS = 60.0  # enough of a slow model, if it ran thrice


class LatencyPrices:
    """Seconds per forward pass of the example batch, each distinct layer and rank timed once.

    A factored layer is timed as the two plain layers that it is exported as, on an input of the
    shape that it meets in the model.

    Attributes:
        whole: seconds of the whole model as it is, without what inference folds away.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        calls: Mapping[str, Sequence[Call]],
    ):
        self.model = without_folded_norms(prepared(model, share=True).eval())
        self.example, self.calls, self.device = example, calls, example.device
        self.whole = min(dense for (dense,) in model_rounds(example, self.model))
        self._known: dict[tuple, float] = {}

    def ranks(self, layer: Layer, scheme: str | None) -> list[int]:
        """Multiples that suit the device, rising by about `STEP`, below the break-even rank."""
        multiple = MULTIPLE.get(self.device.type, 8)
        last, offered = layer.worthwhile_rank(scheme), []
        rank = multiple
        while rank <= last:
            offered.append(rank)
            rank = max(rank + multiple, round(rank * STEP / multiple) * multiple)
        return offered

    def current(self, layer: Layer) -> float:
        """Seconds of a layer as it is, all its uses in one pass."""
        return self._seconds(layer, ("current",), lambda: _plain(layer.module))

    def factored(self, layer: Layer, scheme: str | None, rank: int) -> float:
        """Seconds of a layer at a rank, all its uses in one pass."""
        return self._seconds(layer, (scheme, rank), lambda: _plain(_hollow(layer, scheme, rank)))

    def measured(self, chosen: Mapping[str, tuple[str | None, int]]) -> float:
        """Seconds of the whole model with some layers at a (scheme, rank), over those without.

        The median over rounds in which both run, as a benchmark would find it: what else goes on
        in memory and between threads is a part of a whole model's time, not noise to be rid of.
        """
        planned = prepared(self.model, share=True)
        new = {
            layer.name: _callable(_hollow(layer, *chosen[layer.name]))
            for layer in find_layers(planned)
            if layer.name in chosen
        }
        rounds = model_rounds(self.example, self.model, install(planned, new))
        return statistics.median(factored / dense for dense, factored in rounds)

    def _seconds(self, layer: Layer, what: tuple, make: Callable[[], nn.Module]) -> float:
        calls = self.calls.get(layer.name, ())
        total, module = 0.0, None
        for call in calls:
            key = (_signature(layer), call.input_shape, *what)
            if key not in self._known:
                module = make() if module is None else module
                dtype = next(module.parameters()).dtype
                x = torch.full(call.input_shape, 0.1, dtype=dtype, device=self.device)
                self._known[key] = seconds(lambda m=module, x=x: m(x), self.device)
            total += self._known[key]
        return total


def model_rounds(example: Tensor, *models: nn.Module) -> list[list[float]]:
    """Seconds of one forward pass of each, round by round: what drifts drifts for all."""
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(inference(model, fused=True))
        runs = [lambda model=model: model(example) for model in models]
        return timed_rounds(runs, example.device, MODEL_SECONDS * len(models), MODEL_RUNS)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: the least of several, as all else that happens only adds."""
    return min(took for (took,) in timed_rounds([run], device))


def timed_rounds(
    runs: Sequence[Callable[[], object]],
    device: torch.device,
    least_seconds: float = LEAST_SECONDS,
    least_rounds: int = LEAST_RUNS,
) -> list[list[float]]:
    """Seconds of one call of each, in turns, over and over: a list for every round."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    rounds: list[list[float]] = []
    spent = 0.0
    with torch.inference_mode():
        for run in (*runs, *runs):
            run()
        while spent < least_seconds or len(rounds) < (3 if spent > MOST_SECONDS else least_rounds):
            took = []
            for run in runs:
                wait()
                start = time.perf_counter()
                run()
                wait()
                took.append(time.perf_counter() - start)
            rounds.append(took)
            spent += sum(took)
    return rounds


def _hollow(layer: Layer, scheme: str | None, rank: int) -> Factored:
    """The layer as it will be at a rank, with numbers that mean nothing."""
    weight = next(layer.module.parameters())
    (m, n), groups = layer.shape(scheme), layer.groups
    lead = (groups,) if groups > 1 else ()

    def fill(*shape: int) -> Tensor:
        return torch.full((*lead, *shape), 0.1, dtype=weight.dtype, device=weight.device)

    return layer.factored(Factors(fill(m, rank), fill(rank), fill(n, rank)), scheme)


def _plain(module: nn.Module) -> nn.Module:
    """As it is exported: a factored layer as two plain ones."""
    return nn.Sequential(*module.pair()).eval() if isinstance(module, Factored) else module


def _callable(module: Factored) -> nn.Module:
    # Models may read a linear layer's weight instead of calling it, so that stays what it is.
    return module if isinstance(module, FactoredLinear) else _plain(module)


def _signature(layer: Layer) -> tuple:
    """What decides a layer's time, besides its input."""
    module = layer.module
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    geometry = tuple(getattr(module, name, None) for name in names)
    has_bias = getattr(module, "bias", None) is not None
    return (layer.kind, layer.weight_shape, layer.current_rank, has_bias, *geometry)
