"""Everything that is said once is said in settings.ini; this file only hands it to setuptools."""
import shlex
from configparser import ConfigParser

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
words = lambda key: shlex.split(cfg.get(key, ""))

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="MIT",
    keywords=cfg["keywords"],
    packages=find_packages(include=["cala", "cala.*"]),
    include_package_data=True,
    python_requires=f">={cfg['min_python']}",
    install_requires=words("requirements"),
    extras_require={"dev": words("dev_requirements"), "track": words("track_requirements"), "faiss": words("faiss_requirements"),
                    "browser": words("browser_requirements")},
    entry_points={
        "console_scripts": [line.strip() for line in cfg["console_scripts"].splitlines() if line.strip()],
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
)
