"""Training as one call: it sets the stage for the loop, and gives back what it borrowed."""

from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from trainers.checks import check_plain
from trainers.data import Data
from trainers.device import resolve_device
from trainers.distributed import join_world, synchronised_batch_norm
from trainers.history import History
from trainers.interrupt import interruptible
from trainers.layout import channels_last_in, lay_back
from trainers.loop import Metrics, Training
from trainers.randomness import repeatable
from trainers.rules import SSA, RuleSettings
from trainers.settings import TrainSettings
from trainers.state import RunFolder

__all__ = ["History", "TrainSettings", "train_local"]


def train_local(
    model: nn.Module,
    data: Data,
    *,
    rule: RuleSettings | None = None,
    settings: TrainSettings | None = None,
    teacher: nn.Module | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Metrics | None = None,
) -> History:
    """Train a model in place, with a local rule or by backpropagation.

    Afterwards the model holds the last epoch's weights, on the device it came from and laid out as
    before. SIGINT and SIGTERM end training after the step in hand. The caller's random state is
    left as it was.

    Args:
        model: factored, or dense for the rules that need no factors.
        data: images that fit the model.
        rule: SSA by default.
        teacher: the dense original, for local distillation; it is put in eval mode and frozen, and
            comes back to its device likewise.
        out: folder for `log.jsonl`, `diagnostics.jsonl`, `last.safetensors`, `best.safetensors` and
            `state.pt`; without one nothing is kept but the model itself.
        resume: go on with the run in `out`, with what it began with; its weights replace the
            model's.
        progress: called every `log_every` steps with epoch, epochs, step, steps, loss, accuracy,
            rank, images_per_s and eta_s, and after each epoch with its record, epochs, and
            epoch_done=True.

    Raises:
        StiefelError: data, model and settings don't fit together, the loss is no longer finite, or
            a file can't be read or written.
    """
    rule, settings = rule or SSA(), settings or TrainSettings()
    check_plain(model)
    device = resolve_device(settings.device)
    networks = [network for network in (model, teacher) if network is not None]
    homes = [next(iter(network.parameters()), torch.empty(0)).device for network in networks]
    layouts = [channels_last_in(network) for network in networks]
    modes = [(module, module.training) for module in model.modules()]
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            if device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))
            world = stack.enter_context(join_world(device))
            seed, deterministic = settings.seed + world.rank, settings.deterministic
            stack.enter_context(repeatable(seed, device, deterministic=deterministic))
            stop = stack.enter_context(interruptible())
            training = Training(model, data, rule, settings, device, world)
            training.folder = None if out is None else RunFolder(out)
            training.progress = progress if world.is_main else None
            training.prepare(teacher, resume)
            if settings.batch_norm == "sync":
                norms = synchronised_batch_norm(world, model, training.state)
                stack.enter_context(norms)
            return training.run(stop)
    finally:
        model.zero_grad()
        for network, home, last in zip(networks, homes, layouts, strict=True):
            network.to(home)
            lay_back(network, last)
        for module, mode in modes:
            module.training = mode
