"""The names that `from cala import ...` promises: each loads, on first use, and editors know it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import cala


@pytest.mark.parametrize("name", cala.PUBLIC)
def test_each_public_name_is_the_one_of_its_module(name):
    value = getattr(cala, name)
    assert value.__module__ == f"cala.{cala.PUBLIC[name]}"
    assert name in dir(cala)


def test_the_stub_for_editors_names_the_same():
    stub = (Path(cala.__file__).parent / "__init__.pyi").read_text(encoding="utf-8")
    names = {name: module for module, name in re.findall(r"^from \.(\S+) import (\w+) as \2$", stub, re.MULTILINE)}
    assert names == cala.PUBLIC


def test_importing_cala_imports_no_torch():
    code = "import sys, cala; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        cala.nothing  # noqa: B018
