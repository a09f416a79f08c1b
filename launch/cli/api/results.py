"""A run that was trained, as Python objects: its figures as tables, its student as a model."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from launch.artifacts.run_data import RunData
from launch.artifacts.run_directory import RunDirectory
from launch.artifacts.summary import RunSummary
from launch.artifacts.untrusted_files import read_text
from launch.cli.api.overrides import got
from launch.report.figures import short_number
from opd.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainedRun:
    """Run directory as Python objects: tables, model, tokenizer. Tables are read from its files at every access."""

    path: Path

    @property
    def _data(self) -> RunData:
        return RunData.read(RunDirectory.open(self.path))

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def metrics(self) -> "pd.DataFrame":
        """Table of all steps, by `step`; docs/diagnostics.md has the columns."""
        import pandas as pd

        lines = list(self._data.metrics)
        return pd.DataFrame.from_records(lines).set_index("step") if lines else pd.DataFrame()

    @property
    def evaluations(self) -> "pd.DataFrame":
        """Table of the student's evaluations, by `step`: accuracies, reverse KL, lengths, costs.

        They are on the set that stands for the run; `evaluation_sets` has all with their intervals.
        """
        lines = [point.as_json() for point in self._data.student]
        return _table_of([{name: value for name, value in line.items() if name != "estimates"} for line in lines])

    @property
    def evaluation_sets(self) -> "pd.DataFrame":
        """Table of the student's evaluations on every set, by `step`: a line per measure with its interval."""
        points = [point for of in self._data.by_set.values() for point in of]
        return _table_of(
            [
                {"step": p.step, "set": p.set, "measure": name, "value": e.value, "low": e.low, "high": e.high}
                for p in points
                for name, e in p.estimates.items()
            ]
        )

    @property
    def samples(self) -> "pd.DataFrame":
        """Table of the completions that were kept (`tracker.samples`)."""
        import pandas as pd

        return pd.DataFrame.from_records([sample.as_json() for sample in self._data.samples])

    @property
    def summary(self) -> RunSummary:
        """Outcome, costs, first and last evaluation. Raises `DataError` while there is none."""
        summary = self._data.summary
        if summary is None:
            raise DataError(f"{self.path} has no summary: the run goes on or was killed; wait for it, or resume it")
        return summary

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved settings, without secrets."""
        return yaml.safe_load(read_text(RunDirectory.open(self.path).config, "give the directory of a run"))

    @property
    def command(self) -> str:
        """The command that makes this run again."""
        return read_text(RunDirectory(self.path).command, "give the directory of a run").strip()

    @property
    def report(self) -> Path:
        """The page to open in a browser."""
        return RunDirectory(self.path).report

    @property
    def export(self) -> Path:
        """Folder of the trained student, for transformers, vLLM and others."""
        return RunDirectory(self.path).export

    @cached_property
    def student(self) -> "PreTrainedModel":
        """Trained student as a model of transformers, on the CPU, in the dtype it was saved in."""
        from hf.plain_model import plain_model

        return plain_model(self.export)

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Tokenizer of the student."""
        from hf.plain_model import plain_tokenizer

        return plain_tokenizer(self.export)

    def _repr_html_(self) -> str:
        """Table for notebooks: first and last evaluation."""
        from markupsafe import escape

        points = self._data.student
        rows = [(p.step, p.greedy, p.mean_at_k, p.reverse_kl) for p in [*points[:1], *points[1:][-1:]]]
        cells = "".join(
            f"<tr>{''.join(f'<td>{escape(short_number(v) if v is not None else chr(8211))}</td>' for v in row)}</tr>"
            for row in rows
        )
        return (
            f"<b>{escape(self.name)}</b><table><tr><th>step</th><th>greedy</th><th>sampled</th><th>reverse KL</th></tr>"
            f"{cells}</table><code>{escape(self.report)}</code>"
        )


def _table_of(lines: Sequence[Mapping[str, Any]]) -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame.from_records(list(lines)).set_index("step") if lines else pd.DataFrame()


def open_run(path: str | Path) -> TrainedRun:
    """A run from its directory, finished or not. Raises `ConfigurationError` if that is none."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ConfigurationError(f"open_run needs the directory of a run, got {got(path)}; give its path")
    return TrainedRun(RunDirectory.open(Path(path)).path)
