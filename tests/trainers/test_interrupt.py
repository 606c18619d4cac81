"""The first signal is a wish, the second a command; afterwards all is as before."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from trainers.interrupt import interruptible


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_only_asks(number):
    before = signal.getsignal(number)
    with interruptible() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert signal.getsignal(number) == before
    assert signal.getsignal(number) == before


def test_the_second_signal_acts_as_always():
    with interruptible() as stop, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="mine"), interruptible():
        raise ValueError("mine")
    assert signal.getsignal(signal.SIGINT) == before


def test_other_threads_are_left_alone():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with interruptible() as stop:
            seen.append((signal.getsignal(signal.SIGINT), stop.requested))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.requested
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


GROUP = """
import os, signal, sys, time
from tests.trainers.networks import digits_network
from tests.trainers.short import Images, own, settings
from trainers.rules import BP
from trainers.trainer import train_local

class Slow(Images):
    def __getitem__(self, index):
        time.sleep(0.005)  # so that workers are not done before
        return super().__getitem__(index)

def stop(now):
    if now.get("step") == 2:
        os.killpg(0, signal.SIGTERM)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a background process may ignore it
    data, chosen = own(Slow([0, 1] * 200)), settings(batch_size=16, workers=2, log_every=1)
    rest = {"rule": BP(), "settings": chosen, "out": sys.argv[1], "progress": stop}
    print(train_local(digits_network(), data, **rest).interrupted)
"""


def test_a_wish_sent_to_the_whole_group_spares_the_workers_that_read_images(tmp_path):
    script = tmp_path / "group.py"
    script.write_text(GROUP)
    done = subprocess.run(
        [sys.executable, script, tmp_path / "run"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "True\n", done.stderr
    assert (tmp_path / "run" / "state.pt").exists()
