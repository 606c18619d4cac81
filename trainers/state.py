"""What a training run keeps on disk: checkpoints, the log, and all that resuming needs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic_core import to_json
from torch import nn

from converter.checkpoints import save_factored
from converter.errors import StiefelError, first_line
from converter.factors import Factored
from converter.files import atomic_path, check_place, write_text
from trainers.manifold import tied_layers, truncate_

FORMAT = "stiefel training state 11"


class RunFolder:
    """Checkpoints, `log.jsonl` and `diagnostics.jsonl`, and `state.pt` in one folder."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.state = self.path / "state.pt"
        self.last = self.path / "last.safetensors"
        self.best = self.path / "best.safetensors"
        self.log = self.path / "log.jsonl"
        self.diagnostics = self.path / "diagnostics.jsonl"
        self._others: list[Path] = []  # another run's, to be removed

    def start(self) -> None:
        """Make the folder; a finished run in it goes when the first epoch of this one is written.

        Raises:
            StiefelError: it can't be made, or holds an interrupted run, which is not thrown away.
        """
        if self.state.exists() and not self.read()["finished"]:
            raise StiefelError(
                f"{self.path} holds an interrupted run; resume it, choose another folder, or "
                "remove this one"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StiefelError(f"cannot use {self.path} for training: {error.strerror}") from error
        check_place(self.state)
        self._others = [self.state, self.last, self.best, self.log, self.diagnostics]

    @property
    def has_weights(self) -> bool:
        """Whether `last` is there, and of this run."""
        return self.last.exists() and not self._others

    def write(self, network: nn.Module, state: Mapping[str, Any], *, best: bool) -> None:
        """Write the checkpoints, the log, and last of all the state, each whole or not at all."""
        while self._others:
            self._others.pop(0).unlink(missing_ok=True)
        records = state["records"]
        write_text(self.log, _lines(records))
        if state["looks"]:
            write_text(self.diagnostics, _lines(state["looks"]))
        history = {"step": "train", "rule": state["rule_settings"]["name"], "epochs": len(records)}
        for path in [self.best, self.last] if best else [self.last]:
            save_factored(network, path, history=history)
        with atomic_path(self.state) as temporary:
            try:
                torch.save({"format": FORMAT, **state}, temporary)
            except RuntimeError as error:  # torch's own word for a disk that is full
                raise StiefelError(f"cannot write {self.state}: {first_line(error)}") from error

    def read(self) -> dict[str, Any]:
        """The state, on the CPU.

        Raises:
            StiefelError: there is none, it can't be read, or it is damaged.
        """
        if not self.state.is_file():
            raise StiefelError(f"nothing to resume: there is no {self.state}")
        try:
            state = torch.load(self.state, map_location="cpu", weights_only=True)
        except PermissionError as error:
            raise StiefelError(f"cannot read {self.state}: {error.strerror}") from error
        except Exception as error:  # whatever a damaged file makes the unpickler raise
            raise StiefelError(f"{self.state} is damaged; train anew in another folder") from error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise StiefelError(f"{self.state} is no training state of this version")
        return state


def _lines(records: list[dict[str, Any]]) -> str:
    # JSON has no word for what is not finite.
    return "".join(f"{to_json(r, inf_nan_mode='null').decode()}\n" for r in records)


def restore(
    network: nn.Module, state: nn.Module, kept: Mapping[str, Mapping[str, torch.Tensor]], path: Path
) -> None:
    """Load what was kept of a network, which may still have the ranks it began with, and its rule.

    Raises:
        StiefelError: it is another architecture's, or the rule's of a network that was cut
            otherwise; the network is left as it was.
    """
    ranks = _fitting_ranks(network, kept["network"], path)
    try:
        state.load_state_dict(kept["state"])
    except RuntimeError as error:
        raise StiefelError(
            f"{path} holds the read-outs of other blocks than this model's: resume with the model "
            "as it was when the run began, on the same kind of device"
        ) from error
    for name, (layer, *tied) in tied_layers(network).items():
        if ranks.get(name, layer.rank) < layer.rank:
            truncate_(layer, ranks[name], tied=tied)
    network.load_state_dict(kept["network"])


def _fitting_ranks(
    network: nn.Module, kept: Mapping[str, torch.Tensor], path: Path
) -> dict[str, int]:
    """The ranks that were kept, if all else has the network's shapes."""
    own = network.state_dict()
    # Under each of its names, where one module has several.
    modules = network.named_modules(remove_duplicate=False)
    layers = [name for name, module in modules if isinstance(module, Factored)]
    ranks = {name: kept[f"{name}.S"].shape[-1] for name in layers if f"{name}.S" in kept}
    for key in [*own, *kept]:
        layer, _, leaf = key.rpartition(".")
        shapes = [tuple(held[key].shape) if key in held else None for held in (own, kept)]
        if layer in ranks and leaf in ("U", "S", "V") and None not in shapes:
            fits = shapes[0][:-1] == shapes[1][:-1] and shapes[1][-1] <= shapes[0][-1]
        else:
            fits = shapes[0] == shapes[1]
        if not fits:
            here, there = (s or "absent" for s in shapes)
            raise StiefelError(
                f"{path} is of another architecture: {key} is {there} there, {here} in this model"
            )
    return ranks
