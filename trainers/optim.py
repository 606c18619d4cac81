"""The optimizer and its learning rate, step by step."""

import math

import torch
from torch import nn
from torch.optim import Optimizer

from converter.factors import Factored
from trainers.settings import TrainSettings


def build_optimizer(network: nn.Module, state: nn.Module, settings: TrainSettings) -> Optimizer:
    """AdamW or SGD over the trainable parameters of the network and of the rule's state.

    Weight decay goes to plain weights alone: on U and V it would only fight the retraction, on S it
    would shrink the function, and norms, biases and read-outs are customarily left out.
    """
    decayed, plain = split_parameters(network)
    plain += [p for p in state.parameters() if p.requires_grad]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # One kernel for all parameters, on the CPU too, where it spares most of the step's overhead.
    if settings.optimizer == "adamw":
        betas = (settings.momentum, 0.999)
        return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, fused=True)
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, fused=True)


def split_parameters(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters that weight decay is for, and all others, each once."""
    decayed: dict[int, nn.Parameter] = {}
    plain: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in decayed or id(parameter) in plain:
                continue
            # Norms' weights are vectors; position embeddings and class tokens aren't named weight.
            decays = (
                not isinstance(module, Factored)
                and name.endswith("weight")
                and parameter.ndim >= 2
                and not isinstance(module, nn.Embedding)
            )
            (decayed if decays else plain)[id(parameter)] = parameter
    return list(decayed.values()), list(plain.values())


def learning_rate(step: int, total: int, settings: TrainSettings) -> float:
    """The rate of step `step` (0-based) of `total`: a linear rise, then the schedule's fall."""
    rising = math.ceil(settings.warmup * total)
    if step < rising:
        return settings.lr * (step + 1) / rising
    done = (step - rising) / max(1, total - rising)
    if settings.schedule == "cosine":
        return settings.lr * 0.5 * (1 + math.cos(math.pi * done))
    if settings.schedule == "linear":
        return settings.lr * (1 - done)
    return settings.lr
