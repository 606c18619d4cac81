"""What `stiefel`, `python -m stiefel` and torchrun start: ready for signals before torch loads."""

import os
import signal

_ASKING = (signal.SIGINT, signal.SIGTERM)


def main() -> None:
    """Run the command; SIGTERM interrupts it as SIGINT does, with exit status 130."""
    _handle(_leave)
    from stiefel.cli import main as command

    _handle(signal.default_int_handler)  # raises KeyboardInterrupt
    command(prog_name="stiefel")


def _leave(number: int, frame: object) -> None:
    """Nothing has begun that could be lost; an exception would get lost in half-made imports."""
    os.write(2, b"stiefel: interrupted before it began\n")
    os._exit(130)


def _handle(handler: object) -> None:
    for number in _ASKING:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
