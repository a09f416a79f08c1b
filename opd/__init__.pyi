from launch.cli.api import TrainedRun as TrainedRun
from launch.cli.api import evaluate as evaluate
from launch.cli.api import evaluate_sets as evaluate_sets
from launch.cli.api import open_run as open_run
from launch.cli.api import plan as plan
from launch.cli.api import train as train
from opd.errors import ConfigurationError as ConfigurationError
from opd.errors import DataError as DataError
from opd.errors import OpdError as OpdError

PACKAGES: tuple[str, ...]
