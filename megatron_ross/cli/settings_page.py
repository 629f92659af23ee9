"""docs/settings.md: every setting of a run with its type, default and meaning, from the same text as `--help`."""

from __future__ import annotations

import re
from dataclasses import MISSING, Field, fields
from typing import Any

from megatron_ross.config.cli import build_parser
from megatron_ross.config.schema import SECTIONS

HEAD = """# Settings

<!-- Written by tools/settings_page.py from megatron_ross/config/schema.py: change the text there. -->

Each setting is a key of a YAML file and a flag of the same name (`micro_batch_size: 2`, `--micro-batch-size 2`;
dashes are as good as underscores, a bare `--bf16` is true). `--config` may be given several times; files are read in
order, and flags override them. `--config recipe:ross/finetune_siglip_qwen2` names a file of `examples/` that comes
with the package (also `recipe:llava/...`, `recipe:images/...`, `recipe:shared/...`, `recipe:layouts/...`).
`megatron-ross train --help` shows the same text; `plan`, `prepare-data` and `cache-latents` understand all settings,
too. The model's architecture is not among them: it comes with the checkpoint.
"""


def settings_page() -> str:
    """The whole page."""
    texts = {action.dest: action.help or "" for action in build_parser("")._actions}
    return "\n".join([HEAD, *(_section(section, texts) for section in SECTIONS.values())])


def _section(section: type, texts: dict[str, str]) -> str:
    title = str(section.__doc__).splitlines()[0].rstrip(".")
    rows = "\n".join(f"| `{f.name}` | {_type(f)} | `{_default(f)}` | {_cell(texts[f.name])} |" for f in fields(section))
    return f"## {title}\n\n| setting | type | default | meaning |\n|---|---|---|---|\n{rows}\n"


def _type(field: Field[Any]) -> str:
    """As the source has it; the values of a `Literal` alone."""
    return _cell(re.sub(r"Literal\[([^]]*)\]", r"\1", str(field.type)).replace("'", "`"))


def _default(field: Field[Any]) -> str:
    value = field.default if field.default_factory is MISSING else field.default_factory()
    return "''" if value == "" else str(value)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
