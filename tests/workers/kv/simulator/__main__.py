"""Play schedules FIRST to FIRST + COUNT and print what happened: ``... FIRST COUNT``."""

from __future__ import annotations

import json
import sys

from .world import run_schedules

first, count = map(int, sys.argv[1:])
print(json.dumps(run_schedules(range(first, first + count))))
