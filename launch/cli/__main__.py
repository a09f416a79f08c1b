"""`python -m launch.cli ...` is `opd ...`, where the program itself is not on the path."""

from launch.cli.main import main

main()
