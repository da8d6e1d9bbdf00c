"""Packaging: `kernels`, `data_prep`, `launch` and `ds_configs` install as parts of `elas`, through links in `elas/`."""

from setuptools import find_namespace_packages, setup

setup(packages=find_namespace_packages(include=["elas", "elas.*"], exclude=["*__pycache__*"]))
