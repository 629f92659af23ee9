"""Write docs/settings.md anew: python tools/settings_page.py"""

from __future__ import annotations

from pathlib import Path

from megatron_ross.cli.settings_page import settings_page

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"

if __name__ == "__main__":
    PAGE.write_text(settings_page(), encoding="utf-8")
    print(PAGE)
