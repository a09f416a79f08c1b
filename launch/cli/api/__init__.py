"""The Python interface: `opd.train`, `opd.plan`, `opd.evaluate` and `opd.open_run` (docs/python.md).

The same settings, errors and objects as the command line: everything that is given becomes an override, so that a run
can be repeated by its `command.txt`.
"""

import logging
import warnings

# What a notebook without ipywidgets would say above every run; the progress of a run needs none. Said before tqdm and
# Ray are imported, which is when the first of them says it.
warnings.filterwarnings("ignore", message="IProgress not found")
logging.getLogger("ray.widgets.util").setLevel(logging.WARNING)

from launch.cli.api.results import TrainedRun, open_run  # noqa: E402
from launch.cli.api.verbs import evaluate, evaluate_sets, plan, train  # noqa: E402

__all__ = ["TrainedRun", "evaluate", "evaluate_sets", "open_run", "plan", "train"]
