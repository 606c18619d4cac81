"""What every benchmark shares: rows kept as they are measured, so that a run can be resumed."""

import json
import multiprocessing
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from converter.errors import StiefelError
from converter.files import write_text
from export.doctor import environment
from trainers.data import Data
from trainers.device import resolve_device
from trainers.history import History

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
Work = Callable[[], Mapping[str, Any]]


class Study:
    """Rows of measurements in one JSON file, each found again by what was asked of it.

    Args:
        path: the JSON file; rows that it has already are not measured again.
        about: what the study is, and everything that holds for all of its rows.
        device: where it is measured.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], device: str = "cpu") -> None:
        self.path, self.about, self.device = path, dict(about), device
        self.rows: list[Row] = []
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["about"] != self.about:
                raise StiefelError(f"{path} holds another study; name another --out or move it")
            self.rows = kept["rows"]

    def find(self, **asked: Any) -> list[Row]:
        """The rows that were measured for `asked`."""
        return [row for row in self.rows if asked.items() <= row.items()]

    def forget(self, **asked: Any) -> None:
        """Drop the rows for `asked`; the file keeps them until others are measured."""
        self.rows = [row for row in self.rows if not asked.items() <= row.items()]

    def measure(self, asked: Mapping[str, Any], work: Work) -> Row:
        """The row for `asked`: kept from before, or measured now and kept."""
        if known := self.find(**asked):
            return known[0]
        print(_words(asked), end=": ", flush=True)
        found = _timed(work)
        print(_words(found), flush=True)
        return self._keep(asked, found)

    def measure_all(self, tasks: Iterable[tuple[Row, Work]], jobs: int = 1) -> None:
        """Measure everything asked for, `jobs` at a time, each in a process of its own.

        What they are then told to take, time above all, is in each other's company.
        """
        if jobs == 1:
            for asked, work in tasks:
                self.measure(asked, work)
            return
        threads = max(1, (os.cpu_count() or 1) // jobs)
        torch.set_num_threads(threads)  # here too, for the environment told in the file
        context = multiprocessing.get_context("spawn")
        tasks = list(tasks)
        left = [(asked, work) for asked, work in tasks if not self.find(**asked)]
        running: dict[Future, Row] = {}
        failure: BaseException | None = None
        with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads,)) as pool:
            while running or (left and failure is None):
                # No more than can run: what waits in the pool can't be called back.
                while left and failure is None and len(running) < jobs:
                    asked, work = left.pop(0)
                    running[pool.submit(_timed, work)] = asked
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    asked = running.pop(done)
                    failure = failure or done.exception()
                    if done.exception() is None:
                        print(f"{_words(asked)}: {_words(done.result())}", flush=True)
                        self._keep(asked, done.result())
        if failure is not None:
            raise failure
        found = [row for asked, _ in tasks for row in self.find(**asked)]
        self.rows = [row for row in self.rows if row not in found] + found  # in the order asked
        self.save()

    def _keep(self, asked: Mapping[str, Any], found: Row) -> Row:
        self.rows.append({**asked, **found})
        self.save()
        return self.rows[-1]

    def save(self) -> None:
        """Write everything measured so far, with where it was measured last."""
        kept = {
            "about": self.about,
            "environment": environment(resolve_device(self.device)) | {"commit": commit()},
            "rows": self.rows,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(kept, indent=1) + "\n")


def commit() -> str:
    """The commit of the code that measures, marked where the tree has changes of its own."""
    here = Path(__file__).parent
    words = ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude=*"]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def matching(names: Iterable[str], globs: Sequence[str]) -> list[str]:
    """The names that match one of these globs, or all where there are none."""
    return [name for name in names if any(fnmatch(name, glob) for glob in globs or ("*",))]


def mean_sd(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± sample standard deviation of percentages or the like; how many where few."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return f"{mean} (one)"
    spread = f"{mean} ± {statistics.stdev(values):.{digits}f}"
    return spread if len(values) > 2 else f"{spread} (two)"


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *lines))


def completed(history: History) -> History:
    """The history of a training that ran to its end: half a training is no row.

    Raises:
        KeyboardInterrupt: it was interrupted.
    """
    if history.interrupted:
        raise KeyboardInterrupt
    return history


def held_back(data: Data, plain: Data, count: int) -> Data:
    """`count` training images of `data`; tested on the rest, not augmented, from `plain`."""
    order = torch.randperm(len(plain.train), generator=torch.Generator().manual_seed(0))
    return replace(data, train=data.train.at(order[:count]), test=plain.train.at(order[count:]))


def real_data(data: str | None) -> Path:
    """The folder of real data: as given, or `STIEFEL_DATA`, or `shared/data` beside the repository.

    Raises:
        StiefelError: there is no such folder.
    """
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(data or os.environ.get("STIEFEL_DATA", default))
    if not folder.is_dir():
        raise StiefelError(f"no folder {folder}: name the data's with --data or STIEFEL_DATA")
    return folder


def _timed(work: Work) -> Row:
    start = time.perf_counter()
    return {**work(), "seconds": round(time.perf_counter() - start, 1)}


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_short(value)}" for key, value in values.items() if _short(value))


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if isinstance(value, int | str) else ""
