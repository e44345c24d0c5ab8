r"""Finds the parts of an answer that count: text after the thoughts, last box, last code block."""

import re

THINK = "<think>"
END_THINK = "</think>"
_FENCE = re.compile(
    r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+#.-]*)[^\n`]*\n(.*?)^[ \t]*\1[`~]*[ \t]*$", re.DOTALL | re.MULTILINE
)
_PYTHON = ("", "python", "python3", "py")


def final_text(text: str) -> str:
    """Returns the text after the last `</think>`, or nothing if the thoughts do not end.

    The prompt may have opened the thoughts, so `</think>` counts without `<think>`.
    """
    _, mark, after = text.rpartition(END_THINK)
    if THINK in after:
        return ""
    return after if mark else text


def shown_answer(text: str, *, boxed: bool) -> str | None:
    """Returns the text after the thoughts, or the last box in it if `boxed`, or None if there is none."""
    part = last_boxed(final_text(text)) if boxed else final_text(text)
    return part if part is not None and part.strip() else None


def normalize_text(text: str, *, ignore_case: bool) -> str:
    """Returns a text with single spaces between words, and in small letters if case is ignored."""
    plain = " ".join(text.split())
    return plain.casefold() if ignore_case else plain


def last_boxed(text: str) -> str | None:
    r"""Returns the content of the last `\boxed{...}` or `\fbox{...}`, or None if there is no complete one.

    A box that holds only a box counts as the inner one. A box in the middle of another one is part of its content.
    """
    content = None
    at = 0
    while match := re.compile(r"\\(?:boxed|fbox)\s*\{").search(text, at):
        end = _closing_brace(text, match.end())
        if end is None:
            at = match.end()  # an open brace; a complete box may still follow
            continue
        content = text[match.end() : end]
        at = end
    if content is None:
        return None
    content = content.strip()
    inner = re.match(r"\\(?:boxed|fbox)\s*\{", content)
    if inner and _closing_brace(content, inner.end()) == len(content) - 1:
        return last_boxed(content)
    return content


def last_code(text: str) -> str | None:
    """Returns the last fenced block of Python code (or without a language), or None if there is none."""
    blocks = [match[3] for match in _FENCE.finditer(text) if match[2].lower() in _PYTHON]
    return blocks[-1] if blocks else None


def _closing_brace(text: str, start: int) -> int | None:
    """Returns the place of the brace that closes one before `start`; escaped braces do not count."""
    depth = 1
    at = start
    while at < len(text):
        if text[at] == "\\":
            at += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return at
        at += 1
    return None
