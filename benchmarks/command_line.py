"""What the command lines of all benchmarks share."""

from typing import Any

import click

from converter.errors import StiefelError


class Script(click.Command):
    """Turns what a user can put right into one line and exit status 1."""

    def invoke(self, context: click.Context) -> Any:
        """See click."""
        try:
            return super().invoke(context)
        except StiefelError as error:
            raise click.ClickException(str(error)) from error


class Listed(click.ParamType):
    """Values of one type separated by commas, as a tuple."""

    name = "list"

    def __init__(self, kind: Any = str) -> None:
        self.kind = click.types.convert_type(kind)

    def convert(self, value: Any, param: Any, context: Any) -> tuple:
        """See click."""
        if isinstance(value, tuple):
            return value
        parts = filter(None, map(str.strip, value.split(",")))
        return tuple(self.kind(part, param, context) for part in parts)

    def get_metavar(self, param: Any, ctx: Any) -> str:
        """See click."""
        return "A,B,…"
