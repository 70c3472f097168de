"""Configs of version 0.1 import the runner of the demo from here."""

from ..engine.data_root import DataRootRunner  # noqa: F401
