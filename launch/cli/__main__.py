"""Entry point `python -m launch.cli ...`, the same as `opd ...` where the program is not on the path."""

from launch.cli.main import main

main()
