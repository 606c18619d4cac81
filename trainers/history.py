"""What a training run came to, epoch by epoch."""

from typing import Any

from pydantic import Field

from converter.settings import Settings


class History(Settings):
    """What a training run came to."""

    records: list[dict[str, Any]] = Field(
        description="one for each epoch: epoch, loss, train_accuracy, test_accuracy, test_loss, "
        "block_losses, lr, ranks, parameters, images_per_s, seconds, peak_memory_mib"
    )
    best_accuracy: float = Field(description="highest test accuracy of any epoch, 0..1")
    interrupted: bool = Field(description="whether it was stopped before its end")
    diagnostics: list[dict[str, Any]] = Field(
        default=[], description="one for each look: epoch (0: before training), layers, blocks"
    )
