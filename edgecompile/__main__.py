"""``python -m edgecompile``."""

from edgecompile.cli import main

main(prog_name="edgecompile")
