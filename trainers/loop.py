"""The training loop, whatever the rule: epochs, checkpoints, resume, metrics."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from converter.cost import count_parameters
from converter.errors import StiefelError, first_line
from converter.factors import factored_layers
from trainers import checks
from trainers.capture import RecordedStep, can_record
from trainers.data import Data, images
from trainers.device import autocast, peak_memory_mib
from trainers.diagnostics import Diagnostics
from trainers.distributed import World
from trainers.evaluate import evaluate
from trainers.history import History
from trainers.interrupt import Stop
from trainers.layout import lay_out
from trainers.meter import Meter, Reading
from trainers.origin import check_origin, origin
from trainers.randomness import random_state, restore_random_state
from trainers.rank_schedule import check_schedule, falls, look, lowered
from trainers.rules import RuleSettings, StepResult, make_rule
from trainers.settings import TrainSettings
from trainers.shares import Part, Shares
from trainers.state import RunFolder, restore
from trainers.update import Update

Metrics = Callable[[dict[str, Any]], None]


class Training:
    """One run: what it is made of, the loop, and what is kept of it."""

    folder: RunFolder | None = None
    progress: Metrics | None = None

    def __init__(
        self,
        network: nn.Module,
        data: Data,
        rule: RuleSettings,
        settings: TrainSettings,
        device: torch.device,
        world: World,
    ) -> None:
        self.network, self.data, self.settings = network, data, settings
        self.rule_settings, self.rule = rule, make_rule(rule)
        self.device, self.world = device, world
        checks.check_data(data)
        self.shares = Shares(data, settings, world, device)
        # Where the run is: the epoch in hand, from 1, and how many of its steps are done.
        self.epoch, self.step, self.seconds = 1, 0, 0.0
        self.records: list[dict[str, Any]] = []
        self.looks: list[dict[str, Any]] = []
        self.meter = Meter(world)

    def prepare(self, teacher: nn.Module | None, resume: bool) -> None:
        """Check all that can be checked, build the rest, go to where an earlier run stopped."""
        settings, network, device = self.settings, self.network, self.device
        checks.check_factored(network, self.rule_settings)
        checks.check_trainable(network)
        if settings.batch_norm != "frozen":
            together = self.world.size if settings.batch_norm == "sync" else 1
            checks.check_batch_norm(network, self.shares.part * together)
        model = look(network)
        if not resume:  # else the ranks may have fallen since
            check_schedule(settings.ranks, settings.epochs, model)
        if settings.ranks.active:
            checks.check_ties(network)
        self.first_ranks, self.kept_energy = model.ranks(), {}
        self.origin = origin(settings, self.rule_settings, self.data, teacher)
        kept = self._kept() if resume else None

        example = images(self.data.train, self.shares.part, settings.seed).to(device)
        networks = [network] if teacher is None else [network, teacher]
        self.layout = lay_out(settings.memory_format, example, *networks)
        example = example.contiguous(memory_format=self.layout)
        checks.check_precision(network, example)
        outputs = checks.count_outputs(network, example, self.data)
        checks.check_test_images(network, example, self.data)
        self._set_mode()
        generator = torch.Generator().manual_seed(settings.seed)
        # The rule sees the network as it began; a resumed run then takes up what became of it.
        self.state = self.rule.init(network, example, outputs, generator, teacher).to(device)
        if kept is not None:
            restore(network, self.state, kept, self.folder.state)
        self.world.broadcast_(network, self.state)
        if kept is not None and self.world.rank < len(kept["buffers"]):
            network.load_state_dict(kept["buffers"][self.world.rank], strict=False)
        total = settings.epochs * self.shares.steps
        self.update = Update(network, self.state, settings, device, self.world, total)
        if kept is not None:
            self._restore(kept)
        elif self.folder is not None and self.world.is_main:
            self.folder.start()
        self._prepare_step()
        if settings.diagnostics:
            rest = {"seed": settings.seed, "label_smoothing": settings.label_smoothing}
            self.diagnostics = Diagnostics(
                network, self.rule, self.state, self.data, images=self.shares.part, **rest
            )

    def run(self, stop: Stop) -> History:
        """Train the epochs that are left."""
        while not self._finished():
            if self.step == 0:
                if not self.records:
                    self._look(0)
                self._lower_ranks()
            if not self._train_epoch(stop):
                self._save(best=False)
                return self._history(interrupted=True)
            self._finish_epoch()
            stopping = self.reading.stop or (stop.requested and self.world.size == 1)
            if stopping and not self._finished():
                return self._history(interrupted=True)
        return self._history(interrupted=False)

    def _train_epoch(self, stop: Stop) -> bool:
        """Train what is left of the epoch; False if asked to stop before its end."""
        self._set_mode()
        start, before, first = time.perf_counter(), self.seconds, self.step
        due = self._next_look(pace=None)
        for parts in self.shares.training(self.epoch, self.step, self.layout):
            self._train_step(parts)
            self.step += 1
            last = self.step == self.shares.steps
            # A single process can stop at once; several agree on it whenever they look.
            stopping = stop.requested and self.world.size == 1
            if last or stopping or self.step >= due:
                steps = self.step - first
                self.reading = self._read(stop, lambda n=steps: (time.perf_counter() - start) / n)
                self.seconds = before + time.perf_counter() - start
                self._report(self.reading)
                if self.reading.stop and not last:
                    return False
                due = self._next_look(self.reading.pace)
        if first == self.shares.steps:  # all but its evaluation was done before
            self.reading = self._read(stop, lambda: 0.0)
        return True

    def _next_look(self, pace: float | None) -> int:
        """The step after which to look at the losses, as all processes reckon it.

        Args:
            pace: seconds a step; None: not known yet.
        """
        every = self.settings.log_every
        due = self.step - self.step % every + every
        if self.world.size == 1:
            return due
        # Whoever asks processes to stop gives them but seconds.
        soon = 1 if pace is None else max(1, int(_STOP_SECONDS / pace))
        return min(due, self.step + soon)

    def _train_step(self, parts: list[Part]) -> None:
        """One step on one batch, which comes in parts; it never waits for the device."""
        for x, y in parts:
            self.meter.add(self.learn(x, y), y)
        step = (self.epoch - 1) * self.shares.steps + self.step
        self.update(step)
        if self.step == self.shares.steps - 1:
            self.update.settle(step)
        if isinstance(self.learn, RecordedStep) and self.learn.replays:
            self.update.record()

    def _prepare_step(self) -> None:
        """Build `learn`, forward and backward, for the parameters that are there now."""
        # Not through self, which holds it: a graph should go when its time is over.
        rule, network, state, update = self.rule, self.network, self.state, self.update
        device, settings = self.device, self.settings

        def learn(x: Tensor, y: Tensor) -> StepResult:
            rest = {"scale": update.scale(), "label_smoothing": settings.label_smoothing}
            with autocast(device, settings.precision):
                return rule.step(network, state, x, y, **rest)

        self.learn = learn
        if settings.cuda_graph and can_record(self.rule_settings, device, self.world.size):
            self.learn = RecordedStep(learn, (network, state))

    def _lower_ranks(self) -> None:
        if not self.settings.ranks.active:
            return
        epochs, model = self.settings.epochs, look(self.network, self.kept_energy)
        ranks = lowered(self.settings.ranks, self.epoch, epochs, model, self.first_ranks)
        self.kept_energy = model.kept_at(ranks)
        if self.update.truncate(ranks):
            self._prepare_step()

    def _look(self, epoch: int) -> None:
        """Diagnose, if it is time to; the training goes on as if nothing had happened."""
        every = self.settings.diagnostics
        if every and epoch % every == 0:
            self._set_mode()
            with self.update.paused():
                self.looks.append({"epoch": epoch, **self.diagnostics()})

    def _finish_epoch(self) -> None:
        """Evaluate, record, save."""
        self.world.average_buffers_(self.network)
        accuracy, loss = self._tested()
        record = {
            "epoch": self.epoch,
            "loss": self.reading.loss,
            "train_accuracy": self.reading.accuracy,
            "test_accuracy": accuracy,
            "test_loss": loss,
            "block_losses": self.reading.per_block,
            "lr": self.update.lr,
            "ranks": self._ranks(),
            "parameters": count_parameters(self.network),
            "images_per_s": self.shares.steps * self.shares.batch / self.seconds,
            "seconds": self.seconds,
            "peak_memory_mib": peak_memory_mib(self.device),
        }
        better = all(accuracy > earlier["test_accuracy"] for earlier in self.records)
        self.records.append(record)
        self._look(self.epoch)
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        self.meter = Meter(self.world)
        self._save(best=better)
        if self.progress:
            self.progress({**record, "epochs": self.settings.epochs, "epoch_done": True})

    def _evaluate(self) -> tuple[float, float]:
        """Test accuracy (0..1) and loss, each process taking its share of the images."""
        test, settings = self.shares.test(), self.settings
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        if len(test):
            found = evaluate(
                self.network,
                test,
                device=self.device,
                precision=settings.precision,
                workers=settings.workers,
                layout=self.layout,
            )
            share = torch.tensor([found.accuracy, found.loss, 1.0], dtype=torch.float64)
            sums += (share * found.images).to(self.device)
        correct, loss, total = self.world.sum_(sums).tolist()
        return correct / total, loss / total

    def _tested(self) -> tuple[float, float]:
        """As `_evaluate`; where that fails, the epoch is saved for a run to be resumed at its test.

        Raises:
            StiefelError: it failed, or the loss is not finite.
        """
        try:
            accuracy, loss = self._evaluate()
        except (StiefelError, torch.OutOfMemoryError) as error:
            raise StiefelError(f"{first_line(error)}{self._kept_untested()}") from error
        if not math.isfinite(loss):
            self._check_weights()
            raise StiefelError(
                f"the test loss became {loss}, though the weights are finite: look at the test "
                f"images, or train in fp32{self._kept_untested()}"
            )
        return accuracy, loss

    def _kept_untested(self) -> str:
        if self.folder is None or self.world.size > 1:  # several processes would not agree
            return ""
        self._save(best=False)
        return f"; the epoch's training is kept in {self.folder.path}, to be resumed"

    def _read(self, stop: Stop, pace: Callable[[], float]) -> Reading:
        """Look at the losses.

        Raises:
            StiefelError: one of them is not finite.
        """
        reading = self.meter.read(stop.requested, pace)
        local = getattr(self.rule_settings, "error", None) == "layerwise"
        if (culprit := reading.nonfinite(local=local)) is not None:
            self._give_up(*culprit)
        return reading

    def _check_weights(self) -> None:
        culprit = checks.name_of_nonfinite(self.network, self.state)
        if culprit is not None:
            self._give_up(f"parameter {culprit}", float("nan"))

    def _give_up(self, what: str, value: float) -> None:
        kept, clip = "", self.settings.clip
        if self.folder is not None and self.folder.has_weights:
            kept = f"; {self.folder.last} holds the last good weights"
        raise StiefelError(
            f"{what} became {value} by step {self.step} of epoch {self.epoch}{kept}; "
            f"train anew, in another folder, with a lower lr{', or' if clip else ','} a longer "
            f"warmup{'' if clip else ' or clip'}"
        )

    def _report(self, reading: Reading) -> None:
        if not self.progress:
            return
        speed = self.step * self.shares.batch / self.seconds
        left = (self.settings.epochs - self.epoch + 1) * self.shares.steps - self.step
        ranks = self._ranks().values()
        self.progress(
            {
                "epoch": self.epoch,
                "epochs": self.settings.epochs,
                "step": self.step,
                "steps": self.shares.steps,
                "loss": reading.loss,
                "accuracy": reading.accuracy,
                "rank": sum(ranks) / len(ranks) if ranks else None,
                "images_per_s": speed,
                "eta_s": left * self.shares.batch / speed,
            }
        )

    def _save(self, *, best: bool) -> None:
        """Write everything down, unless the weights are no longer finite."""
        self._check_weights()
        parts = {name: getattr(self, name).state_dict() for name in _PARTS}
        random = self.world.gather(random_state(self.device))
        # Each process's own running statistics, until an epoch's end makes one of them.
        buffers = self.world.gather(self._buffers()) if self.world.size > 1 else []
        if self.folder is None or not self.world.is_main:
            return
        place = {name: getattr(self, name) for name in _PLACE}
        rest = {"finished": self._finished(), "random": random, "buffers": buffers}
        self.folder.write(self.network, {**self.origin, **place, **parts, **rest}, best=best)

    def _buffers(self) -> dict[str, Tensor]:
        """This process's, on the CPU."""
        own = self.network.state_dict()
        return {n: own[n].cpu() for n, _ in self.network.named_buffers() if n in own}

    def _kept(self) -> dict[str, Any]:
        """The state of the run to resume, of the same settings, data and teacher.

        Raises:
            StiefelError: there is none, or it is another's.
        """
        if self.folder is None:
            raise StiefelError("nothing to resume: give the folder of the run as out")
        kept = self.folder.read()
        check_origin(kept, self.origin, self.folder.path)
        return kept

    def _restore(self, kept: dict[str, Any]) -> None:
        for name in _PLACE:
            setattr(self, name, kept[name])
        self.update.load_state_dict(kept["update"])
        self.meter.load_state_dict(kept["meter"], self.device)
        if self.world.rank < len(kept["random"]):
            restore_random_state(kept["random"][self.world.rank], self.device)

    def _finished(self) -> bool:
        settings = self.settings
        if self.epoch > settings.epochs or settings.early_stop is None:
            return self.epoch > settings.epochs
        # What fewer directions lose is no sign of an end: epochs count from the last fall on.
        first = max(falls(settings.ranks, settings.epochs), default=1)
        since = [record["test_accuracy"] for record in self.records[first - 1 :]]
        return bool(since) and len(since) - 1 - since.index(max(since)) >= settings.early_stop

    def _history(self, *, interrupted: bool) -> History:
        best = max((record["test_accuracy"] for record in self.records), default=0.0)
        return History(
            records=self.records,
            best_accuracy=best,
            interrupted=interrupted,
            diagnostics=self.looks,
        )

    def _ranks(self) -> dict[str, int]:
        return {name: layer.rank for name, layer in factored_layers(self.network).items()}

    def _set_mode(self) -> None:
        self.network.train()
        if self.settings.batch_norm == "frozen":
            for module in self.network.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()


_STOP_SECONDS = 5.0  # so long at most, or a step, until several processes heed a wish to stop
_PLACE = ("epoch", "step", "seconds", "records", "looks", "first_ranks", "kept_energy")
_PARTS = ("network", "state", "update", "meter")
