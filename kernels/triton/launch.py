"""What every launch of a kernel says."""

from __future__ import annotations

from typing import Final

OPTIONS: Final = {"enable_fp_fusion": True}
"""Products and sums may be contracted: versions of Triton differ in what they do unasked."""
