"""Messages name settings that exist: what a user copies from a message into a recipe must be taken."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterator

import pytest

from megatron_ross.config.schema import RunConfig
from tests.helpers.sources import ROOT

SETTINGS = set(RunConfig().to_flat())
OPTION = re.compile(r'"--([a-z][a-z0-9-]*)"')
NAME = re.compile(r"(?<![\w./<:-])[a-z]+(?:_[a-z0-9]+)+(?![\w/]|\.[a-z])")
ASSIGNED = re.compile(r"(?<![\w.])([a-z][a-z0-9_]*)=$")

OTHER_NAMES = {
    # names of other projects, of values, packages and files' fields, and arguments of calls in Python
    *("fused_weight_gradient_mlp_cuda", "scaled_dot_product_attention", "rope_scaling", "select_layer", "use_fast"),
    *("text_config", "denoiser_vit3x", "image_url", "row_group_size", "lacks_images"),
    *("format_version", "megatron_ross", "consumed_sequences", "pack_length", "qwen_2", "question_type"),
}
FOREIGN = ("megatron_ross/convert/", "megatron_ross/huggingface/", "megatron_ross/evaluation/")
"""They speak of the fields of other projects' files. There, a name is wrong if it is nearly a setting's."""

NO_MESSAGES = {"megatron_ross/config/other_names.py"}
"""A table of what other projects' settings are called here."""

ALIKE = 0.75


def sources() -> Iterator[tuple[str, str]]:
    for folder in ("megatron_ross", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if name not in NO_MESSAGES:
                yield name, path.read_text(encoding="utf-8")


def options() -> set[str]:
    """Names of all command-line options as they may be written in a message."""
    return {found.replace("-", "_") for _, text in sources() for found in OPTION.findall(text)}


def is_wrong(name: str, path: str, known: set[str]) -> bool:
    if name in known:
        return False
    return not path.startswith(FOREIGN) or bool(difflib.get_close_matches(name, SETTINGS, cutoff=ALIKE))


def wrong_names(path: str, text: str, known: set[str]) -> list[str]:
    """Names in sentences, or in front of `=value`, that are neither settings nor options."""
    tree = ast.parse(text)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            is_sentence = " " in node.value.strip()
            found += [
                f"{path}:{node.lineno}: {n}"
                for n in NAME.findall(node.value)
                if is_sentence and is_wrong(n, path, known)
            ]
    for error in (node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None):
        for before, after in pieces(error):
            if isinstance(after, ast.FormattedValue) and isinstance(before, ast.Constant):
                found += [
                    f"{path}:{before.lineno}: {n}" for n in ASSIGNED.findall(before.value) if is_wrong(n, path, known)
                ]
    return found


def composed_names(path: str, text: str) -> list[str]:
    """Names that a message puts together from parts, so that nobody can find them: `max_{name}_share`."""
    found = []
    for error in (node.exc for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Raise) and node.exc):
        for before, after in pieces(error):
            text_before = before.value if isinstance(before, ast.Constant) else ""
            text_after = after.value if isinstance(after, ast.Constant) else ""
            if re.search(r"(?<![\w/.])[a-z]+_$", text_before) or re.match(r"_[a-z]", text_after):
                found.append(f"{path}:{error.lineno}: {text_before[-20:]}{{}}{text_after[:20]}")
    return found


def pieces(error: ast.expr) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Neighbouring parts of every f-string."""
    for node in ast.walk(error):
        if isinstance(node, ast.JoinedStr):
            yield from zip(node.values, node.values[1:], strict=False)


def test_messages_name_settings_that_exist() -> None:
    known = SETTINGS | options() | OTHER_NAMES
    assert [wrong for path, text in sources() for wrong in wrong_names(path, text, known)] == []


def test_no_message_puts_a_name_together() -> None:
    allowed = "megatron_ross/parity/fixture.py"  # names of files: case_{name}.json
    assert [wrong for path, text in sources() if path != allowed for wrong in composed_names(path, text)] == []


def test_other_names_are_no_settings_and_are_used() -> None:
    assert not OTHER_NAMES & SETTINGS
    texts = "".join(text for _, text in sources())
    assert [name for name in sorted(OTHER_NAMES) if name not in texts] == []


@pytest.mark.parametrize(
    "line",
    [
        'raise ValueError("more than max_bad_share allows")',
        'raise ValueError(f"max_bad_share={limit}: too many")',
        'raise ValueError(f"sed={limit}: too many")',
        'print(f"{count} samples: lower max_bad_share")',
    ],
)
def test_wrong_names_are_found(line: str) -> None:
    assert len(set(wrong_names("a.py", line, SETTINGS))) == 1


def test_near_misses_are_found_everywhere() -> None:
    path = "megatron_ross/convert/a.py"
    assert wrong_names(path, 'raise ValueError("more than max_bad_share allows")', SETTINGS)
    assert not wrong_names(path, 'raise ValueError("config.json has no tie_word_embeddings")', SETTINGS)


def test_composed_names_are_found() -> None:
    line = 'raise ValueError(f"more than the allowed share (max_{name}_share {limit})")'
    assert composed_names("a.py", line)
    assert not composed_names("a.py", 'raise ValueError(f"{name}={value}: not in {path}/{number}")')
