"""The Python interface: `opd.train`, `opd.plan`, `opd.evaluate` and `opd.open_run` (docs/python.md).

The same settings, errors and objects as the command line: everything that is given becomes an override, so that a run
can be repeated by its `command.txt`.
"""

from launch.cli.api.results import TrainedRun, open_run
from launch.cli.api.verbs import evaluate, evaluate_sets, plan, train

__all__ = ["TrainedRun", "evaluate", "evaluate_sets", "open_run", "plan", "train"]
