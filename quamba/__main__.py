"""`python -m quamba`."""

from quamba.cli import main

main(prog_name="quamba")
