"""What an export hands back."""

from pathlib import Path

from pydantic import Field

from converter.settings import Settings


class ExportResult(Settings):
    """A file that was written and what is known of it."""

    path: Path = Field(description="the file")
    format: str = Field(description="onnx or safetensors")
    precision: str = Field(description="fp32, fp16 or bf16")
    file_size_bytes: int = Field(description="with the external data, if any")
    max_abs_error: float = Field(description="largest difference from torch over all inputs tried")
    max_rel_error: float = Field(description="the same by the largest magnitude of torch's values")
    outputs_compared: int = Field(description="how many numbers were compared")
    compared: str = Field(
        description="outputs, layers (where outputs don't depend on the input) or tensors"
    )
    dynamic: tuple[str, ...] = Field((), description="axes that any size fits")
    ranks: dict[str, int] = Field(description="layers that stay two small products")
    merged: tuple[str, ...] = Field(
        description="layers that are dense again: their rank paid no more"
    )
    folded: tuple[str, ...] = Field(description="batch norms folded into the layer before")
    opset: int | None = Field(None, description="version of ONNX's operators")
