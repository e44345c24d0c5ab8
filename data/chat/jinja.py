"""Writes a chat template as Jinja, for inference servers and `transformers`. Imports no torch.

The text is made from the same table that `data.chat.encode` reads. For text that spells no special token, both give the
same ids. Only this project's own code places special tokens by id; a server parses them from the rendered text.
"""

import json
import re
from pathlib import Path

from data.chat.templates import CHAT_TEMPLATES, TOOLS_HEADING, ChatTemplate, Pieces
from data.special_tokens import BEGIN_OF_SENTENCE, END_OF_SENTENCE, END_THINK

CHAT_TEMPLATE_NAME = "chat_template.jinja"

# Names in capitals are replaced by values of the table.
_JINJA = """\
{%- if thinking is not defined -%}
  {%- set thinking = enable_thinking if enable_thinking is defined else THINKS -%}
{%- endif -%}
{%- set system = namespace(parts=[]) -%}
{%- for message in messages if message['role'] == 'system' -%}
  {%- set system.parts = system.parts + [message['content']] -%}
{%- endfor -%}
{%- if tools -%}
  {%- set system.parts = system.parts + [TOOLS_HEADING] -%}
  {%- for tool in tools -%}
    {%- set tool = tool['function'] or tool -%}
    {%- set about = '\\nDescription: ' + (tool['description'] or '') -%}
    {%- set parameters = '\\n\\nParameters: ' + ((tool['parameters'] or {}) | tojson) -%}
    {%- set system.parts = system.parts + ['### ' + tool['name'] + about + parameters] -%}
  {%- endfor -%}
{%- endif -%}
{{- BEGIN + (system.parts | join(SYSTEM_JOINT)) -}}
{%- set state = namespace(before='') -%}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {{- USER + message['content'] -}}
  {%- elif message['role'] == 'tool' -%}
    {{- OUTPUT_JOINT if state.before == 'tool' else OUTPUTS_BEGIN -}}
    {{- OUTPUT_BEGIN + message['content'] + OUTPUT_END -}}
  {%- elif message['role'] == 'assistant' -%}
    {%- set content = message['content'] or '' -%}
    {%- set thoughts = message['thoughts'] if message['thoughts'] is string else message['reasoning_content'] -%}
    {%- if state.before == 'tool' -%}
      {{- OUTPUTS_END -}}
    {%- elif HAS_THOUGHTS and loop.last and thoughts is string -%}
      {{- THOUGHTS_BEGIN + thoughts + THOUGHTS_END -}}
    {%- else -%}
      {{- ASSISTANT -}}
    {%- endif -%}
    {{- content.split(END_THINK)[-1] -}}
    {%- for call in message['tool_calls'] or [] -%}
      {%- set call = call['function'] or call -%}
      {{- CALLS_BEGIN if loop.first else CALL_JOINT -}}
      {{- CALL_BEGIN + call['name'] + SEPARATOR -}}
      {{- call['arguments'] if call['arguments'] is string else (call['arguments'] | tojson) -}}
      {{- CALL_END + (CALLS_END if loop.last else '') -}}
    {%- endfor -%}
    {{- END -}}
  {%- endif -%}
  {%- set state.before = message['role'] -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {%- if state.before == 'tool' -%}
    {{- OUTPUTS_END -}}
  {%- else -%}
    {{- THOUGHTS_BEGIN if HAS_THOUGHTS and thinking else ASSISTANT -}}
  {%- endif -%}
{%- endif -%}
"""


def template_jinja(template: ChatTemplate) -> str:
    """Returns a template as Jinja.

    Its variables are those of `transformers`: `messages`, `tools`, `add_generation_prompt`, and `thinking` (or
    `enable_thinking`), which chooses the generation prompt. As in released templates, only the last message shows its
    thoughts (`reasoning_content`), and an answer's text up to the end of its thoughts is cut.
    """
    thoughts = template.thoughts
    tools = template.tools
    values = {
        "THINKS": json.dumps(template.thinks),
        "TOOLS_HEADING": json.dumps(TOOLS_HEADING),
        "BEGIN": _literal(template.begin),
        "SYSTEM_JOINT": json.dumps(template.system_joint),
        "USER": _literal(template.user),
        "OUTPUT_JOINT": _literal(tools.output_joint),
        "OUTPUTS_BEGIN": _literal(tools.outputs_begin),
        "OUTPUT_BEGIN": _literal(tools.output_begin),
        "OUTPUT_END": _literal(tools.output_end),
        "OUTPUTS_END": _literal(tools.outputs_end),
        "HAS_THOUGHTS": json.dumps(thoughts is not None),
        "THOUGHTS_BEGIN": _literal(() if thoughts is None else thoughts.begin),
        "THOUGHTS_END": _literal(() if thoughts is None else thoughts.end),
        "ASSISTANT": _literal(template.assistant),
        "END_THINK": json.dumps(END_THINK),
        "CALLS_BEGIN": _literal(tools.calls_begin),
        "CALL_JOINT": _literal(tools.call_joint),
        "CALL_BEGIN": _literal(tools.call_begin),
        "SEPARATOR": _literal(tools.separator),
        "CALL_END": _literal(tools.call_end),
        "CALLS_END": _literal(tools.calls_end),
        "END": _literal(template.end),
    }
    return re.sub(r"\b[A-Z_]{3,}\b", lambda match: values[match[0]], _JINJA)


def template_of(folder: Path) -> str | None:
    """Returns the name of the template that this project wrote next to weights; None if there is none."""
    path = folder / CHAT_TEMPLATE_NAME
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, UnicodeDecodeError):
        return None
    return next((name for name, template in CHAT_TEMPLATES.items() if template_jinja(template) == text), None)


def _literal(pieces: Pieces) -> str:
    names = {BEGIN_OF_SENTENCE: "(bos_token or '')", END_OF_SENTENCE: "eos_token"}
    return " + ".join(names.get(piece) or json.dumps(piece, ensure_ascii=False) for piece in pieces) or "''"
