"""Chat templates in the documented formats of published model families, each with a tiny tokenizer that has its control tokens.

The templates are short ones of our own that write what the family's format says; what they are here for is where they differ:
what opens and closes a turn, what the generation prompt holds, whether history is shown otherwise, who may speak first.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from orchestrator.data import load_tokenizer

Kind = Literal["bytes", "pieces"]


@dataclass(frozen=True)
class Family:
    """One family's format."""

    template: str
    eos: str
    special: tuple[str, ...]
    """Control tokens beside `eos`."""
    plain: tuple[str, ...] = ()
    """Added tokens that are not marked special."""
    right_strips: tuple[str, ...] = ()
    """Control tokens that swallow the white space after them."""
    bos: str | None = None
    ends: tuple[str, ...] = ()
    """`eos_token_id` of its generation_config.json; `eos` unless given."""
    kind: Kind = "bytes"
    single: tuple[str, ...] = ("good day",)
    """What is supervised of CHAT, turn by turn, with END for the closing token."""
    multi: tuple[str, ...] = ("good day", "good night")
    tools: tuple[str, ...] = ()
    """What is supervised of CALLING; empty where the family renders no tools."""
    end: str = ""
    """The closing token, where it is not `eos`."""
    system: Literal["read", "refused", "left out"] = "read"
    """What becomes of a system turn."""
    others: tuple[str, ...] = ("<|eom_id|>", "<|call|>", "<|observation|>", "<|user|>", "<|end|>")
    """Closing tokens that a turn of the table may name itself."""
    never_ends: bool = False
    """Whether the format has no token after the last answer."""


CHATML_END = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
HERMES_TOOLS = (
    "{% if tools %}<|im_start|>system\n# Tools{% for t in tools %}\n{{ t | tojson }}{% endfor %}<|im_end|>\n"
    "{% elif messages[0].role != 'system' %}<|im_start|>system\nYou are a helper.<|im_end|>\n{% endif %}"
)
HERMES_CALLS = (
    "{% for c in m.tool_calls %}{% set f = c.function %}{{ '\n' }}<tool_call>\n"
    '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}\n</tool_call>{% endfor %}'
)
CHATML = (
    HERMES_TOOLS + "{% for m in messages %}{% if m.role == 'assistant' and m.tool_calls %}<|im_start|>assistant"
    "{% if m.content %}{{ '\n' + m.content }}{% endif %}" + HERMES_CALLS + "<|im_end|>\n"
    "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + CHATML_END
)
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}"
    "{% if m.role == 'user' and not (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% if tools %}<|im_start|>system\n# Tools{% for t in tools %}\n{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set text = m.content or '' %}"
    "{% set why = m.reasoning_content or '' %}"
    "{% if '</think>' in text %}{% set why = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or why) %}<think>\n{{ why.strip('\n') }}\n</think>\n\n{{ text.lstrip('\n') }}"
    "{% else %}{{ text }}{% endif %}"
    + HERMES_CALLS.replace("{{ '\n' }}", "{{ '' if loop.first and not text else '\n' }}")
    + "<|im_end|>\n"
    "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + CHATML_END
)
LLAMA3 = (
    "{{ bos_token }}{% macro head(r) %}<|start_header_id|>{{ r }}<|end_header_id|>\n\n{% endmacro %}"
    "{% if messages[0].role == 'system' %}{% set said = messages[0].content | trim %}{% set rest = messages[1:] %}"
    "{% else %}{% set said = '' %}{% set rest = messages %}{% endif %}"
    "{{ head('system') }}Cutting Knowledge Date: December 2023\n\n"
    "{% if tools %}Environment: ipython\n{% endif %}{{ said }}<|eot_id|>"
    "{% for m in rest %}{% if m.tool_calls %}{{ head('assistant') }}{% set f = m.tool_calls[0].function %}"
    '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}<|eom_id|>'
    "{% elif m.role == 'tool' %}{{ head('ipython') }}{{ m.content }}<|eot_id|>"
    "{% elif m.role == 'user' and loop.first and tools %}{{ head('user') }}Call one of these.\n"
    "{% for t in tools %}{{ t | tojson }}\n{% endfor %}\n{{ m.content | trim }}<|eot_id|>"
    "{% else %}{{ head(m.role) }}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ head('assistant') }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
STRICT = (
    "{% if messages[0].role == 'system' %}{% set said = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set said = '' %}{% set rest = messages %}{% endif %}"
)
MISTRAL_V1 = (
    "{{ bos_token }}" + STRICT + "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %} [INST] {{ said if loop.last or loop.first else '' }}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_V3 = (
    "{{ bos_token }}" + STRICT + "{% set users = rest | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in rest %}{% if m.role == 'user' %}"
    "{% if tools and m == users[-1] %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {{ said if loop.last else '' }}{{ m.content }}[/INST]"
    "{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}{% if c.id | length != 9 %}"
    "{{ raise_exception('an id has nine characters') }}{% endif %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
    "{{ ', ' if not loop.last }}{% endfor %}]{{ eos_token }}"
    '{% elif m.role == "tool" %}[TOOL_RESULTS] {"content": {{ m.content | tojson }}}[/TOOL_RESULTS]'
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
TEKKEN = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
    "{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    STRICT + "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ said if loop.first else '' }}"
    "{{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
COMMAND_R = (
    "{{ bos_token }}{% set names = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT', 'tool': 'SYSTEM'} %}"
    "{% if tools %}<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>## Available Tools\n{{ tools | tojson }}"
    "<|END_OF_TURN_TOKEN|>{% endif %}"
    "{% for m in messages %}<|START_OF_TURN_TOKEN|><|{{ names[m.role] }}_TOKEN|>"
    "{% if m.tool_calls %}Action: ```json\n[{% for c in m.tool_calls %}"
    '{"tool_name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}{% endfor %}]\n```'
    "{% elif m.role == 'tool' %}<results>\n{{ m.content }}</results>{% else %}{{ m.content }}{% endif %}"
    "<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)
VICUNA = (
    "{{ bos_token }}" + STRICT + "{{ said.strip() or 'A chat between a curious user and an assistant.' }} "
    "{% for m in rest %}{% if m.role == 'user' %}USER: {{ m.content.strip() }} {% else %}"
    "ASSISTANT: {{ m.content.strip() }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
FALCON = (
    "{% for m in messages %}{{ '' if loop.first else '\n\n' }}{{ m.role | capitalize }}: {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
GRANITE = (
    "{% macro head(r) %}<|start_of_role|>{{ r }}<|end_of_role|>{% endmacro %}"
    "{% if tools %}{{ head('available_tools') }}{{ tools | tojson }}<|end_of_text|>\n{% endif %}"
    "{% for m in messages %}{{ head('tool_response' if m.role == 'tool' else m.role) }}"
    "{% if m.tool_calls %}<|tool_call|>{{ m.tool_calls | map(attribute='function') | list | tojson }}{% else %}{{ m.content }}"
    "{% endif %}<|end_of_text|>\n{% endfor %}{% if add_generation_prompt %}{{ head('assistant') }}{% endif %}"
)
GLM4 = (
    "[gMASK]<sop>{% if tools %}<|system|>\n# Tools\n{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}<|assistant|>{{ m.tool_calls[0].function.name }}\n"
    "{{ m.tool_calls[0].function.arguments | tojson }}"
    "{% else %}<|{{ 'observation' if m.role == 'tool' else m.role }}|>\n{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
OLMO2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n{{ m.content }}{{ eos_token }}"
    "{{ '' if loop.last else '\n' }}{% else %}<|{{ m.role }}|>\n{{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SMOLLM3 = (
    "<|im_start|>system\n## Metadata\nReasoning Mode: /no_think\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}<|im_end|>\n"
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n<think>\n\n</think>\n{{ m.content.lstrip('\n') }}"
    "<|im_end|>\n{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n{% endif %}"
)
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ (m.content or '').split('</think>')[-1] }}"
    "{% if m.tool_calls %}<｜tool▁calls▁begin｜>{% for c in m.tool_calls %}<｜tool▁call▁begin｜>function<｜tool▁sep｜>"
    "{{ c.function.name }}\n```json\n{{ c.function.arguments | tojson }}\n```<｜tool▁call▁end｜>{% endfor %}<｜tool▁calls▁end｜>"
    "{% endif %}<｜end▁of▁sentence｜>"
    "{% elif m.role == 'tool' %}<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
HARMONY = (
    "<|start|>system<|message|>You are a helper.\nReasoning: medium<|end|>"
    "{% if tools %}<|start|>developer<|message|># Tools\n{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking and loop.last %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "{% if m.tool_calls %}<|start|>assistant to=functions.{{ m.tool_calls[0].function.name }}<|channel|>commentary json"
    "<|message|>"
    "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}"
    "{% elif m.role == 'tool' %}<|start|>functions to=assistant<|channel|>commentary<|message|>{{ m.content | tojson }}<|end|>"
    "{% else %}<|start|>{{ 'developer' if m.role == 'system' else m.role }}<|message|>{{ m.content }}<|end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
HERMES_CALL = '<tool_call>\n{"name": "find_place", "arguments": {"thing": "kettle"}}\n</tool_call>'
ARGUMENTS = '{"thing": "kettle"}'
IM = ("<|im_start|>", "<|im_end|>")

FAMILIES: dict[str, Family] = {
    "chatml": Family(
        CHATML, "<|endoftext|>", IM, plain=("<tool_call>", "</tool_call>"), end="<|im_end|>",
        tools=(HERMES_CALL, "it is in the shed"),
    ),
    "qwen3": Family(
        QWEN3, "<|im_end|>", ("<|im_start|>", "<|endoftext|>"), plain=("<think>", "</think>", "<tool_call>", "</tool_call>"),
        ends=("<|im_end|>", "<|endoftext|>"),
        single=("<think>\n\n</think>\n\ngood day",), multi=("good day", "<think>\n\n</think>\n\ngood night"),
        tools=(HERMES_CALL, "<think>\n\n</think>\n\nit is in the shed"),
    ),
    "llama3": Family(
        LLAMA3, "<|end_of_text|>", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
        bos="<|begin_of_text|>", end="<|eot_id|>", ends=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        tools=('{"name": "find_place", "parameters": ' + ARGUMENTS + "}<|eom_id|>", "it is in the shed"),
    ),
    "gemma": Family(
        GEMMA, "<eos>", ("<start_of_turn>", "<end_of_turn>"), bos="<bos>", end="<end_of_turn>", ends=("<eos>", "<end_of_turn>"),
        system="refused",
    ),
    "phi3": Family(
        PHI3, "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), end="<|end|>",
        right_strips=("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), ends=("<|endoftext|>", "<|assistant|>", "<|end|>"),
        kind="pieces",
    ),
    "mistral-v1": Family(
        MISTRAL_V1, "</s>", (), bos="<s>", kind="pieces", single=(" good day",), multi=(" good day", " good night"),
    ),
    "mistral-v3": Family(
        MISTRAL_V3, "</s>",
        ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        bos="<s>", kind="pieces", single=(" good day",), multi=(" good day", " good night"), system="left out",
        tools=('[TOOL_CALLS] [{"name": "find_place", "arguments": ' + ARGUMENTS + ', "id": "call00001"}]', " it is in the shed"),
    ),
    "tekken": Family(TEKKEN, "</s>", ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), bos="<s>"),
    "llama2": Family(LLAMA2, "</s>", (), bos="<s>", kind="pieces", single=(" good day ",), multi=(" good day ", " good night ")),
    "zephyr": Family(ZEPHYR, "</s>", (), bos="<s>", kind="pieces"),
    "command-r": Family(
        COMMAND_R, "<|END_OF_TURN_TOKEN|>",
        ("<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"), bos="<BOS_TOKEN>",
        tools=('Action: ```json\n[{"tool_name": "find_place", "parameters": ' + ARGUMENTS + "}]\n```", "it is in the shed"),
    ),
    "vicuna": Family(VICUNA, "</s>", (), bos="<s>", kind="pieces", single=(" good day",), multi=(" good day", " good night")),
    "falcon": Family(
        FALCON, "<|endoftext|>", (), single=(" good day",), multi=(" good day", " good night"), never_ends=True,
    ),
    "granite": Family(
        GRANITE, "<|end_of_text|>", ("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
        tools=('<|tool_call|>[{"name": "find_place", "arguments": ' + ARGUMENTS + "}]", "it is in the shed"),
    ),
    "glm4": Family(
        GLM4, "<|endoftext|>", ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        ends=("<|endoftext|>", "<|user|>", "<|observation|>"), never_ends=True,
        single=("\ngood day",), multi=("\ngood day<|user|>", "\ngood night"),
        tools=("find_place\n" + ARGUMENTS + "<|observation|>", "\nit is in the shed"),
    ),
    "olmo2": Family(OLMO2, "<|endoftext|>", (), bos="<|endoftext|>"),
    "smollm3": Family(SMOLLM3, "<|im_end|>", ("<|im_start|>",), plain=("<think>", "</think>")),
    "deepseek-r1": Family(
        DEEPSEEK_R1, "<｜end▁of▁sentence｜>", (), bos="<｜begin▁of▁sentence｜>",
        plain=(
            "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
            "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
        ),
        tools=(
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>find_place\n```json\n" + ARGUMENTS
            + "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            "it is in the shed",
        ),
    ),
    "harmony": Family(
        HARMONY, "<|return|>", ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"),
        ends=("<|return|>", "<|call|>"), single=("<|channel|>final<|message|>good day",),
        multi=("<|channel|>final<|message|>good day<|end|>", "<|channel|>final<|message|>good night"),
        tools=(
            " to=functions.find_place<|channel|>commentary json<|message|>" + ARGUMENTS + "<|call|>",
            "<|channel|>final<|message|>it is in the shed",
        ),
    ),
}  # fmt: skip


def base_of(family: Family, folder: Path) -> Path:
    """A base's folder with the family's tokenizer, its template, and a generation_config.json."""
    pad = "<|pad|>"
    backend = _bytes() if family.kind == "bytes" else _pieces()
    names = dict.fromkeys([pad, *([family.bos] if family.bos else []), family.eos, *family.special])
    tokens = [AddedToken(name, special=True, normalized=False, rstrip=name in family.right_strips) for name in names]
    backend.add_special_tokens(tokens)
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in family.plain])
    named = {"bos_token": family.bos} if family.bos else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=family.eos, pad_token=pad, **named)
    fast.chat_template = family.template
    fast.save_pretrained(folder)
    ends = [fast.convert_tokens_to_ids(name) for name in family.ends or (family.eos,)]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends if len(ends) > 1 else ends[0]}))
    return folder


def tokenizer_of(family: Family, folder: Path) -> Any:
    return load_tokenizer(base_of(family, folder))


def _bytes() -> Tokenizer:
    """Bytes, some merged; line breaks are split from what follows them, as by the tokenizers after GPT-2's."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "g"), ("o", "o"), ("oo", "d"), ("g", "ood"), ("Ġg", "ood")]
    vocab = {token: number for number, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    words = pre_tokenizers.Split(Regex(r"\s*[\r\n]+|\s+(?!\S)| ?[^\s]+|\s+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    return backend


def _pieces() -> Tokenizer:
    """Pieces with a mark for the space before them and single bytes for the rest, as SentencePiece makes them."""
    letters = ["▁", *(chr(code) for code in range(33, 127))]
    merges = [("▁", "g"), ("o", "o"), ("oo", "d"), ("▁g", "ood"), ("g", "ood")]
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *("".join(pair) for pair in merges)]
    vocab = {token: number for number, token in enumerate(names)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaces = decoders.Replace("▁", " ")
    backend.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse()])
    return backend
