"""For tools that expect this file: everything stands in pyproject.toml."""

from setuptools import setup

setup()
