"""The notebook as it is shipped: executed as a whole, and README tells what it printed."""

import io
import re

import nbformat
import pandas as pd

from tests.command import ROOT


def test_the_notebook_is_shipped_as_it_was_executed_once() -> None:
    notebook = nbformat.read(ROOT / "examples" / "first_run.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(cell.outputs for cell in cells) and not [o for o in outputs if o.output_type == "error"]
    assert not [o for o in outputs if o.get("name") == "stderr"], "nothing that a reader would wonder about"


def test_readme_tells_what_the_notebook_printed() -> None:
    notebook = nbformat.read(ROOT / "examples" / "first_run.ipynb", as_version=4)
    (cell,) = [c for c in notebook.cells if c.source.startswith("run.evaluations[")]
    table = pd.read_fwf(io.StringIO(cell.outputs[0].data["text/plain"]), skiprows=[1])
    first, last = table.iloc[0], table.iloc[-1]
    sentence = re.search(r"\[`examples/first_run\.ipynb`\].*?\n\n", (ROOT / "README.md").read_text(), re.S)
    assert sentence is not None
    told = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", sentence[0].split("ipynb)")[1])]
    kl = [first["reverse_kl"], last["reverse_kl"]]
    assert told == [table.iloc[-1, 0], 100 * first["greedy"], 100 * last["greedy"], *kl]
