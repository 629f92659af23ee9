"""Whether the template that a checkpoint was trained with fits the tokenizer that it is exported with."""

from __future__ import annotations

from megatron_ross.checkpoint.reader import CheckpointReader
from megatron_ross.data.conversation import TEMPLATES


def check_trained_template(reader: CheckpointReader) -> None:
    """Compare them as a run does at its start; a checkpoint that was never trained here has no template.

    Raises:
        ValueError: an answer could not be ended; names template and tokenizer.
    """
    template = reader.manifest.training.get("settings", {}).get("template")
    if template not in TEMPLATES:
        return
    from megatron_ross.data.fit import check_template_fit  # imports transformers with the tokenizer: seconds
    from megatron_ross.data.tokenizer import load_tokenizer

    try:
        check_template_fit(template, load_tokenizer(reader.assets))
    except ValueError as error:
        raise ValueError(
            f"{reader.directory}: trained with a template that its tokenizer in {reader.assets} does not fit: {error}"
        ) from None
