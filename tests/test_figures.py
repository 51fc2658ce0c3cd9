"The figures in nbs/images: drawn by draw.py, well-formed, with a title and a description, in letters that can be read."

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "nbs/images/draw.py"
SVG = "{http://www.w3.org/2000/svg}"


def load_script():
    "draw.py as a module."
    spec = spec_from_file_location("draw_figures", SCRIPT)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DRAW = load_script()
FILES = sorted(DRAW.all_figures())


def test_check_passes():
    result = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_check_notices_a_change(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(DRAW, "HERE", tmp_path)
    assert DRAW.main(check=True) == 1
    assert DRAW.main(check=False) == 0
    assert DRAW.main(check=True) == 0
    with open(tmp_path / "hca.svg", "a") as file:
        file.write(" ")
    capsys.readouterr()
    assert DRAW.main(check=True) == 1
    assert "hca.svg" in capsys.readouterr().err


@pytest.mark.parametrize("name", FILES)
def test_file_is_accessible(name):
    root = ElementTree.parse(SCRIPT.parent / name).getroot()
    assert root.tag == f"{SVG}svg" and root.get("role") == "img"
    assert len(root.find(f"{SVG}title").text) > 5
    assert len(root.find(f"{SVG}desc").text) > 60
    sizes = [float(element.get("font-size")) for element in root.iter() if element.get("font-size")]
    assert min(sizes) >= DRAW.SMALLEST
    assert int(root.get("width")) <= 900


@pytest.mark.parametrize("name", FILES)
def test_file_needs_nothing_from_outside(name):
    text = (SCRIPT.parent / name).read_text()
    assert "prefers-color-scheme: dark" in text
    for forbidden in ("<script", "href=", "@import", "url(", "<image", "<foreignObject"):
        assert forbidden not in text


def test_text_that_does_not_fit_is_an_error():
    figure = DRAW.Figure(200, 100, "title", "description")
    with pytest.raises(ValueError, match="needs"):
        figure.box(10, 10, 40, 20, "much too long for this box")
    with pytest.raises(ValueError, match="too high"):
        figure.box(10, 10, 180, 20, "one", "two")
    with pytest.raises(ValueError, match="leaves the figure"):
        figure.text(190, 50, "too far to the right")


@pytest.mark.skipif(not (ROOT / "cala/backbones").is_dir(), reason="the modules are not in their wings yet")
def test_every_module_is_on_the_figure_of_the_wings():
    lessons = {lesson.split()[1] for lesson in DRAW.LESSONS if lesson not in DRAW.WITHOUT_MODULE}
    wings = {
        "": lessons | set(DRAW.PLAIN),
        "backbones": set(DRAW.BACKBONES),
        "library": set(DRAW.LIBRARY),
        "scripts": set(DRAW.SCRIPTS),
    }
    packages = {"backbones", "library", "scripts"}
    for folder, drawn in wings.items():
        modules = set()
        for path in (ROOT / "cala" / folder).iterdir():
            is_module = path.suffix == ".py" or (path / "__init__.py").exists()
            if is_module and not path.stem.startswith("_"):
                modules.add(path.stem)
        modules -= packages
        assert modules == drawn, f"cala/{folder}: update the lists above draw_wings in {SCRIPT.name} and draw again"
