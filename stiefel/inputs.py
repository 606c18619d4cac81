"""The command-line options that several commands share: which model, which images, where to."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from converter.files import check_place, write_text
from converter.models import parse_args
from converter.settings import LARGEST_SEED
from stiefel.options import collect, given, settings_options
from stiefel.plots import ENDINGS
from stiefel.recipe import DataSection, ModelSection
from stiefel.tables import plain
from trainers.distributed import is_main_process
from trainers.state import RunFolder

Command = TypeVar("Command", bound=Callable[..., Any])
FILE = click.Path(path_type=Path)


class NewFile(click.Path):
    """A file to be written: that it can be is known before the work begins, not after.

    Args:
        endings: those by which it will be read, if not all will do.
    """

    def __init__(self, *endings: str) -> None:
        super().__init__(path_type=Path)
        self.endings = endings

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        """See click; raises StiefelError."""
        path = check_place(super().convert(value, param, ctx))
        if self.endings and path.suffix not in self.endings:
            self.fail(f"{path}: end the name in {' or '.join(self.endings)}", param, ctx)
        return path


NEW_FILE, NEW_CHECKPOINT, NEW_PLOT = NewFile(), NewFile(".safetensors"), NewFile(*ENDINGS)

json_option = click.option("--json", "json_file", type=NEW_FILE, help="write the result as JSON")
seed_range = click.IntRange(0, LARGEST_SEED)
seed_option = click.option("--seed", type=seed_range, default=0, show_default=True)
device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)


def model_options(command: Command) -> Command:
    """What names a model: its factory and weights, or a checkpoint of ours as an argument."""
    decorators = (
        click.argument("path", required=False, metavar="[CHECKPOINT]"),
        click.option("--model", "name", help=_words(ModelSection, "name")),
        settings_options(ModelSection, exclude=("name", "args", "rename")),
        click.option("--model-arg", multiple=True, metavar="KEY=VALUE", help="for its factory"),
        click.option("--rename", multiple=True, metavar="REGEX=…", help="rules for tensor names"),
    )
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def model_section(values: dict[str, Any]) -> ModelSection:
    """What the model options say.

    Raises:
        click.UsageError: two models are named, or none, or something is said that a checkpoint of
            ours says itself, or that only a checkpoint has use for.
    """
    path, name = values.get("path"), values.get("name")
    if path is not None and values.get("checkpoint") is not None:
        raise click.UsageError("name one checkpoint: as an argument or with --checkpoint")
    if path is not None and name is None and ":" in path and not Path(path).exists():
        path, name = None, path
    if path is not None:
        values = {**values, "checkpoint": path}
    if name is None and values.get("checkpoint") is None:
        raise click.UsageError("name a model: a checkpoint of stiefel's, or --model NAME")
    asked = given(ModelSection, {**values, "checkpoint": None, "rename": values["rename"] or None})
    asked += ["--model-arg"] * bool(values["model_arg"])
    if name is None and asked:
        raise click.UsageError(
            f"{asked[0]} goes with --model NAME: a checkpoint of stiefel's says what it holds"
        )
    idle = [option for option in asked if option in ("--rename", "--variant")]
    if values.get("checkpoint") is None and idle:
        raise click.UsageError(f"{idle[0]} goes with a checkpoint of the model's weights")
    return collect(
        ModelSection,
        values,
        name=name,
        args=parse_args(values["model_arg"]),
        rename=values["rename"],
    )


def check_apart(output: Path | None, source: Path | None) -> None:
    """Refuse to write over the checkpoint that is read.

    Raises:
        click.UsageError: they are one file.
    """
    files = [path for path in (output, source) if path is not None and path.exists()]
    if len(files) == 2 and files[0].samefile(files[1]):
        raise click.UsageError(f"-o {output} is the checkpoint that is read: name another file")


def check_not_replaced(folder: Path, source: Path | None) -> None:
    """Refuse to train in the folder of a run with a checkpoint of that run.

    Raises:
        click.UsageError: the new run would write over the checkpoint that is read.
    """
    run = RunFolder(folder)
    if source is not None and source.resolve() in (run.best.resolve(), run.last.resolve()):
        raise click.UsageError(f"{source} is one that this run would replace: name another --out")


def data_options(*without: str) -> Callable[[Command], Command]:
    """What names the images; fields of the data section that are of no use here are left out."""
    source = click.option("--data", "source", required=True, help=_words(DataSection, "source"))
    rest = settings_options(DataSection, exclude=("source", *without))
    return lambda command: source(rest(command))


def data_section(values: dict[str, Any]) -> DataSection:
    """What the data options say."""
    return collect(DataSection, values, source=values["source"])


def write_json(path: Path | None, result: Any) -> None:
    """Write a result for machines, where a file was named for it."""
    if path is not None and is_main_process():
        write_text(path, json.dumps(plain(result), indent=2) + "\n")


def _words(model: type[ModelSection] | type[DataSection], field: str) -> str:
    return model.model_fields[field].description or ""
