"""The notebook of a first run, executed by a kernel: it looks as it is shipped, and TensorBoard reads its run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.command import ROOT

NOTEBOOK = ROOT / "examples" / "first_run.ipynb"
# The same run, shorter.
SHORTER = {"steps=40": "steps=4", '"every": 10': '"every": 2', '"prompts_per_step": 200': '"prompts_per_step": 20'}


def kinds(cell: Any) -> Sequence[tuple[str, Sequence[str]]]:
    """Outputs of a cell: what each is, and in which forms."""
    return [(o.output_type, sorted(o.get("data", {})) or o.get("name", "")) for o in cell.outputs]


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_the_notebook_runs_and_looks_as_it_is_shipped(tmp_path: Path) -> None:
    shipped = nbformat.read(NOTEBOOK, as_version=4)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    first = next(cell for cell in notebook.cells if "opd.train" in cell.source)
    for old, new in {**SHORTER, 'tracker="none"': 'tracker="tensorboard"'}.items():
        assert old in first.source
        first.source = first.source.replace(old, new)
    NotebookClient(
        notebook, timeout=800, kernel_name="python3", coalesce_streams=True, resources={"metadata": {"path": tmp_path}}
    ).execute()
    assert [kinds(c) for c in notebook.cells if c.cell_type == "code"] == [
        kinds(c) for c in shipped.cells if c.cell_type == "code"
    ]
    panels = [o.data["text/plain"] for o in first.outputs if o.output_type == "display_data"]
    assert len(panels) == 1 and "step 4 / 4" in panels[0] and "greedy" in panels[0], "one panel, of the last step"
    (run,) = (tmp_path / "runs").iterdir()
    seen = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [e.step for e in seen.Scalars("distill/reverse_kl")] == [1, 2, 3, 4]
    assert [e.step for e in seen.Scalars("eval/greedy")] == [0, 2, 4]
    text = {n: seen.Tensors(f"{n}/text_summary")[-1].tensor_proto.string_val[0] for n in ("run/command", "run/export")}
    assert b"opd train experiment=shop" in text["run/command"] and run.name.encode() in text["run/export"]
    log = (run / "console.log").read_text()
    assert "first evaluation ..." in log and "step 1/4 | " in log and "step 4/4 | " in log and "╭" not in log
