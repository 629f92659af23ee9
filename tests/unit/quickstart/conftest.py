"""The quickstart's scripts import each other by name, as scripts do: put their folder on the path."""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[3] / "examples" / "quickstart"
sys.path.insert(0, str(FOLDER))
