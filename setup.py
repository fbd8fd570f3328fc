"""The checkout's root is the package ``ltx2_gguf``; its sub-packages are found here, everything else is in pyproject.toml."""

from setuptools import find_packages, setup

NAME = "ltx2_gguf"
found = find_packages(include=["quant", "quant.*", "ltx2_core", "ltx2_core.*", "nodes", "nodes.*"])
setup(
    script_name="setup.py",  # so that this file itself is left out of the package
    packages=[NAME, *(f"{NAME}.{package}" for package in found)],
    package_dir={NAME: "."},
)
