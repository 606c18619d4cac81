"""How to train, whatever the rule: each field is a recipe key and a command-line option."""

from typing import Literal

from pydantic import Field

from converter.settings import LARGEST_SEED, Settings
from trainers.device import DeviceName, Precision
from trainers.layout import MemoryFormat
from trainers.rank_schedule import RankSchedule


class TrainSettings(Settings):
    """Everything about training that is not the learning rule's own."""

    epochs: int = Field(20, ge=1, description="passes over the training images")
    batch_size: int = Field(
        128, ge=1, description="images to a step, over all processes and accumulated parts together"
    )
    lr: float = Field(2e-3, gt=0, description="learning rate at its highest")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="AdamW, or SGD with momentum")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of sgd, β₁ of adamw")
    weight_decay: float = Field(
        1e-4, ge=0, description="decoupled for adamw; never on U, S, V, biases, norms or read-outs"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="how the rate falls to 0 after the warm-up, step by step"
    )
    warmup: float = Field(
        0.05, ge=0, lt=1, description="share of all steps over which the rate rises from 0"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="weight of the uniform distribution in the targets"
    )
    accumulate: int = Field(
        1,
        ge=1,
        description="parts into which each batch is split, to need less memory; what goes by a "
        "whole batch, as norms and similarity matching do, then goes by a part",
    )
    clip: float | None = Field(
        None, gt=0, description="largest norm of the whole gradient; none: no clipping"
    )
    precision: Precision = Field("fp32", description="fp32, or autocast to bf16 or fp16")
    device: DeviceName = Field("auto", description="auto takes CUDA where there is one")
    seed: int = Field(
        0, ge=0, le=LARGEST_SEED, description="of data order, augmentation, feedback and dropout"
    )
    deterministic: bool = Field(
        False, description="only algorithms that repeat bit for bit on CUDA too (slower there)"
    )
    retraction: Literal["newton-schulz", "qr", "polar"] = Field(
        "newton-schulz", description="how U and V are brought back to orthonormal columns"
    )
    retract_every: int = Field(5, ge=0, description="steps between retractions; 0: none")
    ranks: RankSchedule = Field(
        default_factory=RankSchedule, description="when ranks fall, and how far"
    )
    batch_norm: Literal["train", "frozen", "sync"] = Field(
        "train",
        description="statistics of each process's batch (train), the running ones (frozen), or "
        "those of all processes' batches together (sync); read-outs' norms likewise, never frozen",
    )
    memory_format: MemoryFormat = Field(
        "auto",
        description="layout of images in memory; auto: channels_last, where the network takes it",
    )
    cuda_graph: bool = Field(
        True,
        description="record the step once and replay it, where it runs in one process on CUDA and "
        "recomputes nothing; false for models that read values back",
    )
    workers: int | None = Field(
        None, ge=0, description="processes that load large images; none: as many as suit"
    )
    early_stop: int | None = Field(
        None,
        ge=1,
        description="epochs without a better test accuracy before stopping, counted once ranks "
        "fall no more; none: never",
    )
    log_every: int = Field(
        50, ge=1, description="steps between looks at the loss (each waits for the device)"
    )
    diagnostics: int = Field(
        0,
        ge=0,
        description="epochs between looks at angles to backpropagation's gradient, read-outs and "
        "factors (each look needs backpropagation's memory); 0: none",
    )
