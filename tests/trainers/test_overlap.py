"""Blocks side by side compute what blocks in turn do, and never race.

There are no streams on a CPU, so these are simulated: every operation is noted with the stream that
it would run on, and must come after all that it depends on, by the events that were waited for.
Memory that is freed counts as written again by its own stream's next operation, as in CUDA's
allocator.
"""

import copy
import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainers.cuts import cut
from trainers.cuts.walk import Walk
from trainers.rules import SSA, make_rule, overlap

Clock = dict["Stream", int]


class Stream:
    """A queue of operations, and what is known in it to have been done on others."""

    def __init__(self):
        self.clock: Clock = {self: 0}

    def record_event(self) -> Clock:
        return dict(self.clock)

    def wait_event(self, event: Clock) -> None:
        for stream, count in event.items():
            self.clock[stream] = max(self.clock.get(stream, 0), count)

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.clock)

    def done(self, stamp: tuple["Stream", int]) -> bool:
        stream, count = stamp
        return self.clock.get(stream, 0) >= count


class Device(TorchDispatchMode):
    """Notes on which stream every storage is read and written; `races` says what went wrong."""

    def __init__(self, streams: int):
        super().__init__()
        self.main = self.current = Stream()
        self.streams = [Stream() for _ in range(streams)]
        self.written: dict[int, tuple[Stream, int]] = {}
        self.read: dict[int, dict[Stream, tuple[Stream, int]]] = {}
        self.owner: dict[int, Stream] = {}
        self.freed: list[tuple[Stream, list[tuple[Stream, int]]]] = []
        self.races: list[str] = []
        self.used: set[Stream] = set()

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema = func._schema
        if any(r.alias_info and not r.alias_info.is_write for r in schema.returns):
            return result  # a view touches no memory
        here = self.current
        self.used.add(here)
        here.clock[here] += 1
        self._reuse_freed(here, func)
        given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        changed = [
            t
            for a in schema.arguments
            if a.alias_info and a.alias_info.is_write
            for t in _tensors(given.get(a.name))
        ]
        for tensor in _tensors((args, kwargs)):
            self._reads(tensor, here, func)
        for tensor in (*changed, *_tensors(result)):
            self._writes(tensor, here, func)
        return result

    def _reads(self, tensor, here, func):
        key = self._known(tensor, here)
        if key in self.written and not here.done(self.written[key]):
            self.races.append(f"{func} reads what another stream may still write")
        self.read.setdefault(key, {})[here] = (here, here.clock[here])

    def _writes(self, tensor, here, func):
        key = self._known(tensor, here)
        before = [self.written[key]] if key in self.written else []
        if not all(map(here.done, [*before, *self.read.get(key, {}).values()])):
            self.races.append(f"{func} writes what another stream may still use")
        self.written[key] = (here, here.clock[here])

    def _known(self, tensor, here) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.owner:
            self.owner[key] = here
            weakref.finalize(storage, self._free, key)
        return key

    def _free(self, key):
        uses = [*self.read.pop(key, {}).values()]
        uses += [self.written.pop(key)] if key in self.written else []
        self.freed.append((self.owner.pop(key), uses))

    def _reuse_freed(self, here, func):
        for _, uses in [entry for entry in self.freed if entry[0] is here]:
            if not all(map(here.done, uses)):
                self.races.append(f"{func} may be given memory that another stream still uses")
        self.freed = [entry for entry in self.freed if entry[0] is not here]


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.fixture
def side_by_side(monkeypatch, images, labels):
    """Two steps of a rule on simulated streams: the device, and the modules that it trained."""

    def run(settings, network, steps=2):
        network = copy.deepcopy(network)
        rule = make_rule(settings)
        state = rule.init(network, images, 5, torch.Generator().manual_seed(0))
        assert state.overlaps
        device = Device(settings.overlap)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: device.current)
        monkeypatch.setattr(torch.cuda, "stream", device.stream)
        monkeypatch.setattr(overlap, "_streams", lambda *_: device.streams)
        monkeypatch.setattr("trainers.rules.ssa.has_streams", lambda *_: True)
        torch.manual_seed(3)
        gc.collect()
        with device:
            for _ in range(steps):
                result = rule.step(network, state, images, labels)
                sum(result.per_block.values()).add(result.loss)  # as who reads them would
        return device, network, state

    return run


RULES = {
    "two": SSA(overlap=2, memory=0),
    "two, units": SSA(overlap=2, boundaries="units"),
    "four, units": SSA(overlap=4, boundaries="units"),
    "of a sample": SSA(overlap=2, boundaries="units", sample=2),
    "layers": SSA(overlap=3, boundaries="layers"),
    "all terms": SSA(overlap=2, boundaries="units", alpha=0.1, beta=0.1, cosine=0.1, hoyer=0.1),
    "fixed": SSA(overlap=2, boundaries="units", feedback="fixed"),
    "kolen-pollack": SSA(overlap=2, boundaries="units", feedback="kolen-pollack"),
    "calibrated": SSA(overlap=2, boundaries="units", feedback="calibrated"),
}


# Every rule on one network, and the others' ways of crossing a cut under two of them.
PLACES = [("resnet20", rule) for rule in RULES]
PLACES += [(name, "two") for name in ("smallconv", "mobilenetv2")]
PLACES += [(name, "four, units") for name in ("densenet", "vit")]


@pytest.mark.parametrize(("name", "rule"), PLACES)
def test_no_stream_touches_what_another_still_uses(name, rule, side_by_side, factored):
    settings = RULES[rule]
    device, *_ = side_by_side(settings, factored(name))
    assert not device.races
    assert device.used >= {*device.streams[:2]}


@pytest.mark.parametrize(("name", "rule"), PLACES)
def test_gradients_are_those_of_blocks_in_turn(name, rule, side_by_side, factored, images, labels):
    network, settings = factored(name), RULES[rule]
    _, *together = side_by_side(settings, network, steps=1)
    rule = make_rule(settings.model_copy(update={"overlap": 1}))
    state = rule.init(network, images, 5, torch.Generator().manual_seed(0))
    torch.manual_seed(3)
    rule.step(network, state, images, labels)
    for one, other in zip((network, state), together, strict=True):
        for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(theirs.grad, mine.grad, rtol=0, atol=0)
        for mine, theirs in zip(one.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(theirs, mine, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("place", "method", "instead"),
    [
        (Stream, "wait_event", lambda self, event: None),
        (Stream, "wait_stream", lambda self, other: None),
        (Walk, "crossing", lambda self: []),
    ],
    ids=["no waiting for the block before", "no waiting for the streams", "nothing held"],
)
def test_the_simulation_sees_what_is_left_out(
    monkeypatch, place, method, instead, side_by_side, factored
):
    monkeypatch.setattr(place, method, instead)
    device, *_ = side_by_side(RULES["four, units"], factored("resnet20"))
    assert device.races


def test_blocks_that_share_a_layer_run_in_turn(factored, images):
    settings = SSA(overlap=2, boundaries="layers")
    for name, expected in (("shared", False), ("smallconv", True)):
        network = factored(name)
        assert overlap.independent(cut(network, images, settings)) is expected
