"""Tracker settings: records beside the metrics, and the place of wandb's files."""

from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from opd.settings.ranges import In, Line, Matches, Names, Steps
from opd.settings.validation import settings

Tag = Annotated[str, Matches(r"[^\x00-\x1f]{1,64}", "of one line (1 to 64 characters, as wandb asks)")]


class WandbMode(Enum):
    """Place of wandb's run: in the run directory (`wandb sync` sends it), on its server, nowhere."""

    OFFLINE = "offline"
    ONLINE = "online"
    DISABLED = "disabled"


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class TrackerConfig:
    """Tracker settings: records beside the metrics, and the place of wandb's files.

    Options of the group may be given together, `tracker=[wandb,tensorboard]`: each sets a field of its own. Every
    `samples_every` steps (and at the first and last) `samples` completions are kept to look at; a terminal that cannot
    be redrawn gets a line every `print_every` steps.
    """

    # OFFLINE keeps wandb's files in the run directory, ONLINE sends them, DISABLED does without
    mode: WandbMode = WandbMode.DISABLED
    # event files of TensorBoard in the run directory
    tensorboard: bool = False
    # a run in MLflow: on the server that MLFLOW_TRACKING_URI names, else in OUTPUT_DIR/mlflow.db
    mlflow: bool = False
    # project in wandb, experiment in MLflow
    project: Names = "opd"
    # user or team in wandb
    entity: Line | None = None
    # group of runs in wandb, tag of the run in MLflow
    group: Line | None = None
    # tags in wandb and MLflow
    tags: tuple[Tag, ...] = ()
    # completions kept to look at, of each step that is kept
    samples: Annotated[int, In(0, 10_000)] = 4
    # steps between those (and the first and the last)
    samples_every: Steps = 10
    # steps between lines on a terminal that cannot be redrawn
    print_every: Steps = 10
