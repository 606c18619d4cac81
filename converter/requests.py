"""What the user asks of each layer: the common policy and scheme, and the exceptions by glob."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from converter.errors import StiefelError, did_you_mean
from converter.layers import Layer
from converter.ranks import Budget, Policy, parse_rank
from converter.schemes import SCHEMES, check_scheme

Override = Literal["keep"] | Mapping[str, Any]
AUTO = "auto"


@dataclass(frozen=True)
class Request:
    """What is asked of one layer.

    Attributes:
        schemes: those to choose from; (None,) for a linear layer.
        policy: its own policy or the common one.
        forced: whether the rank was asked for by name, and is obeyed though it saves nothing.
        keep: why it is to stay as it is, or None.
    """

    schemes: tuple[str | None, ...]
    policy: Policy
    forced: bool = False
    keep: str | None = None


def read_requests(
    layers: Sequence[Layer], policy: Policy, scheme: str, overrides: Mapping[str, Override]
) -> dict[str, Request]:
    """What is asked of each layer, by name.

    Args:
        layers: of the prepared model.
        policy: for every layer without a rank of its own.
        scheme: "spatial", "channel" or "auto".
        overrides: glob over layer names → "keep", or a mapping with "rank" or "scheme" or both;
            of several that match, the last wins.

    Raises:
        StiefelError: a glob that matches nothing, an override that says nothing known, or a rank
            for a layer, by its very name, that can't be factored.
    """
    names = [layer.name for layer in layers]
    asked: dict[str, tuple[str, Override]] = {}
    for glob, override in overrides.items():
        matching = fnmatch.filter(names, glob)
        if not matching:
            raise StiefelError(f"no layer matches '{glob}'{_near(glob, names)}")
        asked |= dict.fromkeys(matching, (glob, override))
    return {layer.name: _request(layer, policy, scheme, asked.get(layer.name)) for layer in layers}


def _request(
    layer: Layer, policy: Policy, scheme: str, asked: tuple[str, Override] | None
) -> Request:
    glob, override = asked or ("", {})
    by_name = glob == layer.name
    if override == "keep":
        return Request(_schemes(layer, scheme), policy, keep="kept by request")
    if not isinstance(override, Mapping) or not set(override) <= {"rank", "scheme"}:
        raise StiefelError(
            f"layers: '{glob}' is {override!r}; write keep, or a mapping with rank or scheme"
        )
    schemes = _schemes(layer, override.get("scheme") or scheme)
    if layer.refusal is not None:
        if by_name:
            raise StiefelError(f"{layer.name} cannot be factored: {layer.refusal}")
        return Request(schemes, policy, keep=layer.refusal)
    own = override.get("rank")
    # A glob such as '*' does not ask for the first convolution; its own name does.
    if layer.advice is not None and not (by_name and own is not None):
        return Request(schemes, policy, keep=layer.advice)
    if own is None:
        return Request(schemes, policy)
    if isinstance(own := parse_rank(own), Budget):
        raise StiefelError(
            f"layers: '{glob}' has rank {own}; one layer takes a rank, a fraction or energy=…"
        )
    return Request(schemes, own, forced=True)


def _schemes(layer: Layer, scheme: str) -> tuple[str | None, ...]:
    if scheme == AUTO:
        return layer.schemes
    if scheme not in SCHEMES:
        raise StiefelError(f"unknown scheme '{scheme}'; choose from {', '.join((*SCHEMES, AUTO))}")
    # Linear layers have none, and a factored layer keeps its own.
    fixed = layer.is_factored or layer.schemes == (None,)
    return layer.schemes if fixed else (check_scheme(scheme),)


def _near(glob: str, names: Sequence[str]) -> str:
    inside = fnmatch.filter(names, f"{glob.rstrip('.')}.*")
    if inside:
        return f"; the layers inside it are '{glob.rstrip('.')}.*', such as {inside[0]}"
    return did_you_mean(glob, names) or f"; there are {', '.join(names[:3])}, …"
