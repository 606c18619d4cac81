"""The base of every configuration object: frozen, and strict about misspelt names."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A frozen, validated configuration whose fields are also recipe keys and command options."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=False)
