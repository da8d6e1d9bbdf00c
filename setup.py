"""Packaging: the top-level folders `kernels`, `data_prep`, `launch` and `ds_configs` install as parts of `elas`."""

from setuptools import find_namespace_packages, find_packages, setup

MAPPED = {
    "elas.kernels": "kernels",
    "elas.data_prep": "data_prep",
    "elas.launch": "launch",
    "elas.ds_configs": "ds_configs",
}

packages = find_packages(include=["elas", "elas.*"]) + list(MAPPED)
for name, folder in MAPPED.items():
    # launch/deepspeed has no __init__.py: with one, `import deepspeed` in launch/pretrain.py would find that folder.
    packages += [f"{name}.{sub}" for sub in find_namespace_packages(folder, exclude=["*__pycache__*"])]

setup(packages=packages, package_dir=MAPPED)
