"""What a person sees while a command works: status lines, progress bars, notes."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import rich.console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

Step = Callable[[str, int, int], None]
Metrics = Callable[[Mapping[str, Any]], None]


class Console:
    """Results go to standard output, everything about the way there to standard error."""

    def __init__(self) -> None:
        # A file or a pipe has no width of its own; the tables are made for this one.
        width = None if sys.stdout.isatty() else 110
        self._out = rich.console.Console(width=width, highlight=False)
        self._err = rich.console.Console(stderr=True, highlight=False)

    def show(self, thing: Any) -> None:
        """Print a result: a line or a rich table."""
        if isinstance(thing, str):
            self._out.print(thing, markup=False, soft_wrap=True)
        else:
            self._out.print(thing)

    def note(self, text: str) -> None:
        """Remark on something the user may want to know."""
        self._err.print(f"note: {text}", markup=False, style="dim", soft_wrap=True)

    @contextmanager
    def status(self, what: str) -> Iterator[None]:
        """A spinner while something short goes on."""
        with self._err.status(what):
            yield

    @contextmanager
    def progress(self, title: str) -> Iterator[Step]:
        """A bar for work that reports (what, done, total)."""
        columns = (
            TextColumn(f"{title:<11}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
        )
        with self._bar(*columns) as bar:
            task = bar.add_task("", total=None)

            def step(what: str, done: int, total: int) -> None:
                bar.update(task, description=what, completed=done, total=total)

            yield step

    @contextmanager
    def training(self, title: str) -> Iterator[Metrics]:
        """A bar for training, and one lasting line an epoch."""
        columns = (
            TextColumn(f"{title:<11}"),
            BarColumn(bar_width=28),
            TextColumn("{task.description}", markup=False),
        )
        with self._bar(*columns) as bar:
            task = bar.add_task("", total=None)

            def metrics(now: Mapping[str, Any]) -> None:
                if now.get("epoch_done"):
                    line = f"{title}  {_epoch_line(now)}"
                    bar.console.print(line, markup=False, soft_wrap=True)
                else:
                    bar.update(
                        task,
                        description=_step_line(now),
                        completed=now["step"],
                        total=now["steps"],
                    )

            yield metrics

    def _bar(self, *columns: ProgressColumn) -> Progress:
        # Where nobody watches, a bar would only leave blank lines in the log.
        return Progress(
            *columns, console=self._err, transient=True, disable=not self._err.is_terminal
        )


def _epoch_line(now: Mapping[str, Any]) -> str:
    return (
        f"epoch {now['epoch']:>3}/{now['epochs']}  loss {now['loss']:.4f}  "
        f"train {100 * now['train_accuracy']:6.2f} %  test {100 * now['test_accuracy']:6.2f} %  "
        f"{now['parameters']:,} parameters  {now['images_per_s']:,.0f} images/s"
    )


def _step_line(now: Mapping[str, Any]) -> str:
    rank = f"  rank {now['rank']:.0f}" if now["rank"] else ""
    left = timedelta(seconds=round(now["eta_s"]))
    return (
        f"epoch {now['epoch']}/{now['epochs']}  loss {now['loss']:.4f}  "
        f"accuracy {100 * now['accuracy']:.1f} %{rank}  {now['images_per_s']:,.0f} images/s  "
        f"{left} left"
    )
