"""`python -m stiefel`, which is also what torchrun starts."""

from stiefel.cli import main

main(prog_name="stiefel")
