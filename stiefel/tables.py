"""Short human summaries of what the rooms return, for the terminal."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from converter.errors import StiefelError
from converter.inspect import Inspection
from converter.ranks import RankPlan


def as_yaml(document: Mapping[str, Any]) -> str:
    """Plain data as YAML, in its own order."""
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def grid(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> Table:
    """A table whose first `left` columns stand to the left, the others to the right."""
    view = Table(title=title, title_justify="left")
    for place, name in enumerate(header):
        view.add_column(name, justify="left" if place < left else "right", overflow="fold")
    for row in rows:
        view.add_row(*(shown(cell) for cell in row))
    return view


def shown(value: Any) -> str:
    """A cell: numbers grouped by thousands, small fractions to three digits, nothing as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
    if isinstance(value, tuple | list):
        return "×".join(str(part) for part in value)
    return str(value)


def plan_table(plan: RankPlan) -> Table:
    """What becomes of each layer, and of the whole."""
    rows = [
        (
            layer.name,
            layer.kind,
            layer.shape,
            "dense" if layer.rank is None else layer.scheme or "matrix",
            "" if layer.rank is None else f"{layer.rank} of {layer.full_rank}",
            layer.dense_parameters,
            layer.factored_parameters,
            layer.expected_error if layer.rank is not None else None,
            layer.reason or "",
        )
        for layer in plan.layers
    ]
    header = ["layer", "kind", "shape", "scheme", "rank", "dense", "planned", "error", "why dense"]
    return grid(f"Rank plan, {plan.policy}: {totals(plan)}", header, rows, left=4)


def totals(plan: RankPlan) -> str:
    """Parameters and multiply-adds, before and after, in one line."""
    line = _change("parameters", plan.dense_parameters, plan.factored_parameters)
    if plan.dense_macs and plan.factored_macs is not None:
        line += ", " + _change("MACs", plan.dense_macs, plan.factored_macs)
    return line


def inspection_table(found: Inspection) -> Table:
    """Every layer as it is."""
    rows = [
        (
            row.name,
            row.kind,
            row.shape,
            row.scheme or "",
            "" if row.rank is None else f"{row.rank} of {row.full_rank}",
            row.parameters,
            row.macs,
            row.error,
            row.reason or "",
        )
        for row in found.layers
    ]
    header = ["layer", "kind", "shape", "scheme", "rank", "parameters", "MACs", "error"]
    title = f"{found.parameters:,} parameters, {found.macs:,} MACs an image"
    return grid(title, [*header, "why dense"], rows, left=4)


def read_plan(path: Path) -> RankPlan:
    """A plan from its JSON file.

    Raises:
        StiefelError: the file can't be read or is no plan.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StiefelError(f"cannot read plan {path}: {error}") from error
    try:
        return RankPlan.from_json(text)
    except StiefelError as error:
        raise StiefelError(f"{path}: {error}") from error


def file_size(path: Path) -> str:
    """The size of a file, in KiB or MiB."""
    size = path.stat().st_size
    return f"{size / 2**20:.2f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


def _change(what: str, before: int, after: int) -> str:
    return f"{before:,} → {after:,} {what} ({after / before:.1%})"
