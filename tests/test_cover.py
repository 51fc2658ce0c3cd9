"Coverage counts a notebook's exported cells as lines of its module; it has to recognise them in the form in which nbdev_test runs them."
import runpy
from pathlib import Path

import pytest
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("notebook, module", [("09_objectives", "objectives"), ("24_check", "scripts/check")])
def test_every_exported_cell_is_known_with_its_place_in_the_module(notebook, module):
    known, text = runpy.run_path(str(ROOT / ".ci/cover.py"))["exported_lines"](), (ROOT / f"cala/{module}.py").read_text().splitlines()
    run = [cell for cell in NBProcessor(ROOT / f"nbs/{notebook}.ipynb", procs=FrontmatterProc, process=True).nb.cells if "export" in getattr(cell, "directives_", {})]
    assert len(run) > 4
    for cell in run:
        file, shift = known[cell.source.rstrip("\n")]
        first = cell.source.splitlines()[0]
        assert file == str(ROOT / f"cala/{module}.py") and (text[shift] == first or "import" in first)
