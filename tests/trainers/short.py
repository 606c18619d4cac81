"""What short trainings share: data sets of somebody's own, and settings."""

import torch
from torch.utils.data import Dataset

from trainers.data import Data
from trainers.trainer import TrainSettings


class Images(Dataset):
    """A data set of somebody's own: random images (C, H, W) and the labels given."""

    def __init__(self, labels, shape=(1, 8, 8)):
        self.targets = list(labels)
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(len(self.targets), *shape, generator=generator)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return self.images[index], self.targets[index]


def own(train, test=None, classes=10) -> Data:
    test = Images(range(classes)) if test is None else test
    return Data(train, test, tuple(map(str, range(classes))), "own")


def settings(**changes) -> TrainSettings:
    plain = {"epochs": 2, "batch_size": 16, "device": "cpu"}
    return TrainSettings(**{**plain, **changes})
