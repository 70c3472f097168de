"""Where configs of version 0.1 import the runner of the demo from."""

from ..engine.data_root import DataRootRunner  # noqa: F401
