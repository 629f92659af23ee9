"""The training templates as Jinja chat templates for transformers.

Rendered text has one `<image>` per image, at the front of its turn and followed by a newline, as in training. The begin
token is left to the tokenizer. `{% generation %}` marks what training supervises. The tests hold them against the token
ids that `data/conversation.py` makes.
"""

from __future__ import annotations

# Sets `images` (number of images of a message) and `text` (its text) for messages with plain or structured content.
_CONTENT = """\
{%- if message['content'] is string -%}
{%- set ns.images = message['content'].count('<image>') -%}
{%- set ns.text = message['content'] | replace('<image>', '') -%}
{%- else -%}
{%- set ns.images = message['content'] | selectattr('type', 'equalto', 'image') | list | length -%}
{%- set ns.text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') -%}
{%- endif -%}
{%- if ns.images -%}
{%- set ns.text = (('<image>\\n' * ns.images) + (ns.text | trim)) | trim -%}
{%- endif -%}
"""

_USER_ASSISTANT = """\
{%- set ns = namespace(images=0, text='', system=SYSTEM) -%}
{%- for message in messages if message['role'] == 'system' -%}
CONTENT{%- set ns.system = ns.text -%}
{%- endfor -%}
{{- ns.system + ' ' -}}
{%- for message in messages if message['role'] != 'system' -%}
CONTENT{%- if message['role'] == 'user' -%}
{{- 'USER: ' + ns.text + ' ' -}}
{%- elif message['role'] == 'assistant' -%}
{{- 'ASSISTANT:' -}}
{%- generation -%}{{- ' ' + ns.text + END -}}{%- endgeneration -%}
{%- else -%}
{{- raise_exception('roles must be system, user or assistant, not ' + message['role']) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""

_LLAMA3 = """\
{%- set ns = namespace(images=0, text='') -%}
{%- for message in messages -%}
CONTENT{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- ns.text + '<|eot_id|>' -}}{%- endgeneration -%}
{%- else -%}
{{- ns.text + '<|eot_id|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""

_PLAIN = """\
{%- set ns = namespace(images=0, text='') -%}
{%- for message in messages -%}
CONTENT{%- if message['role'] == 'user' -%}
{{- '<image>' * ns.images -}}
{%- elif message['role'] == 'assistant' -%}
{%- generation -%}{{- ns.text + '\\n' -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
"""

_SYSTEM = (
    "A chat between a curious {who} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
)


def chat_template(name: str) -> str:
    """Jinja text of a training template.

    Args:
        name: "qwen_2", "v1", "llama3" or "plain" (images, then the caption; for models that saw stage 1 only);
            "llava_v1" is "v1" in the wording of "qwen_2", with which the published evaluation asks Vicuna.

    Raises:
        ValueError: unknown name.
    """
    if name == "qwen_2":
        return _fill(_USER_ASSISTANT, system=_SYSTEM.format(who="human"), end="<|im_end|>")
    if name in ("v1", "llava_v1"):
        return _fill(_USER_ASSISTANT, system=_SYSTEM.format(who="user" if name == "v1" else "human"), end="</s>")
    if name in ("llama3", "plain"):
        return _fill({"llama3": _LLAMA3, "plain": _PLAIN}[name])
    raise ValueError(f"chat template {name!r} is unknown; use 'qwen_2', 'v1', 'llava_v1', 'llama3' or 'plain'")


def training_template(text: str | None) -> str | None:
    """Name of the training template that a Jinja text is, or is a wording of; None for any other text."""
    names = {chat_template(name): name for name in ("qwen_2", "v1", "llama3", "plain")}
    return (names | {chat_template("llava_v1"): "v1"}).get(text or "")


def _fill(template: str, system: str = "", end: str = "") -> str:
    text = template.replace("CONTENT", _CONTENT)
    return text.replace("SYSTEM", _quote(system)).replace("END", _quote(end))


def _quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
