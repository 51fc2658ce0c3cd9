"""settings.ini is the one place for names, versions and requirements. This file passes them on to setuptools."""

import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

FOLDER = Path(__file__).resolve().parent

config = ConfigParser(delimiters=["="])
config.read(FOLDER / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]


def read_requirements(
    key: str,  # of settings.ini, such as dev_requirements
) -> list[str]:
    "The requirements under a key; one that holds a space is quoted there."
    return shlex.split(settings.get(key, ""))


def read_lines(
    key: str,  # of settings.ini, such as console_scripts
) -> list[str]:
    "The lines under a key, without empty ones."
    lines = [line.strip() for line in settings.get(key, "").splitlines()]
    return [line for line in lines if line]


def read_extras() -> dict[str, list[str]]:
    "Every further list of requirements under the name of its extra: dev_requirements is the extra dev."
    ending = "_requirements"
    keys = [key for key in settings if key.endswith(ending)]
    return {key.removesuffix(ending): read_requirements(key) for key in keys}


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(FOLDER / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="MIT",
    keywords=settings["keywords"],
    packages=find_packages(include=["cala", "cala.*"]),
    package_data={"cala": ["py.typed", "*.pyi", "*.ipynb"]},
    include_package_data=True,
    python_requires=f">={settings['min_python']}",
    install_requires=read_requirements("requirements"),
    extras_require=read_extras(),
    entry_points={
        "console_scripts": read_lines("console_scripts"),
        "nbdev": [f"{settings['lib_path']}={settings['lib_path']}._modidx:d"],
    },
)
