"""Runs that are interrupted where a test wants them to be."""

import os
import signal
from functools import partial

from tests.trainers.networks import digits_network
from trainers.trainer import TrainSettings

network = partial(digits_network, dropout=0.2)


def settings(**changes) -> TrainSettings:
    plain = {"epochs": 3, "batch_size": 16, "log_every": 1, "device": "cpu", "retract_every": 2}
    return TrainSettings(**{**plain, **changes})


class InterruptAt:
    """Sends a signal to this process when training reports a step, or an epoch done.

    It is then in the middle of things, and stops after the step that follows.
    """

    def __init__(self, epoch: int, step: int | None, number: int = signal.SIGINT):
        self.place, self.number = (epoch, step), number

    def __call__(self, now: dict) -> None:
        if (now["epoch"], now.get("step")) == self.place:
            self.place = None
            os.kill(os.getpid(), self.number)
