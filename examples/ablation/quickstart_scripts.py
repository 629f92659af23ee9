"""Puts the quickstart's scripts on the path, which the ablation's data reuse. Import this first."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))
