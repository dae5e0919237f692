"""Packages of the house; the metadata is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["gmm_jepa", "gmm_jepa.*"]), "gmm_jepa.kernels"],
    package_dir={"gmm_jepa.kernels": "kernels"},
    package_data={"gmm_jepa": ["data/*.txt", "evaluate/*.css", "evaluate/*.html"]},
)
