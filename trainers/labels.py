"""Labels as indices of classes, and those that a data set tells without reading its images."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from converter.errors import StiefelError


def as_indices(labels: Tensor, where: str = "the data set") -> Tensor:
    """Labels, whole numbers of any dtype, as int64.

    Raises:
        StiefelError: they are fractions.
    """
    if labels.is_floating_point():
        raise StiefelError(f"{where}: labels must be whole numbers, not {labels.dtype}")
    return labels.long()


def known_labels(dataset: Any) -> Tensor | None:
    """Labels (N,) int64 where the data set keeps them, or what it is a part or made of; else None.

    Its `labels` or `targets` are believed where they are a whole number an image, no
    `target_transform` makes something else of them, and the first item says the same.
    """
    if type(dataset) is Subset:
        whole = known_labels(dataset.dataset)
        return None if whole is None else whole[torch.as_tensor(dataset.indices, dtype=torch.int64)]
    if type(dataset) is ConcatDataset:
        parts = [known_labels(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else torch.cat(parts)
    if getattr(dataset, "target_transform", None) is not None:
        return None
    for name in ("labels", "targets"):
        try:
            found = as_indices(torch.as_tensor(getattr(dataset, name)))
        except Exception:  # it may hold names, or whatever else its owner keeps there
            continue
        if found.shape == (len(dataset),) and _agrees(dataset, found):
            return found
    return None


def _agrees(dataset: Any, labels: Tensor) -> bool:
    """Whether the first item has the first label; one that can't be read contradicts nothing."""
    if len(labels) == 0:
        return True
    try:
        return bool(labels[0] == dataset[0][1])
    except Exception:  # whatever its owner's code raises; who reads the item hears of it
        return True
