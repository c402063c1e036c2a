"""`python -m qrun.cli` is the command `qrun`."""

from qrun.cli.main import run

run()
