"""The base of every configuration object: frozen, and strict about misspelt names."""

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator

LARGEST_SEED = 2**32 - 1  # that every generator takes


class Settings(BaseModel):
    """A frozen, validated configuration whose fields are also recipe keys and command options."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_yes_for_a_number(cls, values: Any) -> Any:
        """YAML reads yes and on as true, which would count as 1."""
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name) if isinstance(value, bool) else None
            allowed = {field.annotation, *get_args(field.annotation)} if field else set()
            if allowed & {int, float} and bool not in allowed:
                raise ValueError(f"{name} is a number, not {'yes' if value else 'no'}")
        return values
