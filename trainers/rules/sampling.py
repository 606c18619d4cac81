"""Learning from a few images of a batch: blocks before the last let the others only run through.

No gradient crosses a cut, so that blocks need not learn from the same images. What an early block
holds for its backward, and that backward itself, shrink with the images that it learns from.
"""

import torch
from torch import Tensor

LEAST = 2  # images that batch statistics can be of


def few(images: int, every: int) -> int:
    """How many of a batch blocks before the last learn from: one in `every`, rounded up.

    All of them where the few, or the others, would be too few for batch norm.
    """
    found = -(-images // every)
    return found if min(found, images - found) >= LEAST else images


def in_front(rows: Tensor, every: int) -> Tensor:
    """Rows 0, every, 2·every … first, then the others; so that a batch's shares give theirs alike.

    Made of slices: indices would have to be sent to the device.
    """
    return torch.cat([rows[start::every] for start in range(every)])


def put_back(rows: Tensor, every: int) -> Tensor:
    """Undo `in_front`."""
    whole = torch.empty_like(rows)
    places = [whole[start::every] for start in range(every)]
    for place, part in zip(places, rows.split([len(place) for place in places]), strict=True):
        place.copy_(part)
    return whole
