"""Packages and their data; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["fftp", "fftp.*", "kernels", "kernels.*", "train", "train.*"]),
    package_data={"train": ["recipes/*.toml", "recipes/*/*.toml"]},
)
