"""The installed version of this package."""

from __future__ import annotations

from importlib.metadata import version

VERSION = version("inference-pio")
