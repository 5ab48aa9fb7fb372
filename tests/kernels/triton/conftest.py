"""Without Triton there is nothing to import here."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
