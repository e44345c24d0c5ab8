"""Hides secrets in logs, records and reports. It finds them by their names and values. No torch here."""

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_WORDS = frozenset(
    [
        "key",
        "keys",
        "apikey",
        "token",
        "password",
        "passwd",
        "passphrase",
        "pwd",
        "secret",
        "secrets",
        "credential",
        "credentials",
        "auth",
        "bearer",
    ]
)
_FOLDERS = ("PWD", "OLDPWD")
"""Variables that look like passwords by their names, but in which a shell stores folders."""
# Shorter values of environment variables may be common words.
_SHORTEST_VALUE = 8
# A name, = or :, and a word in the syntax of a shell: quoted parts, and other parts up to a space or an operator.
_ASSIGNMENT = re.compile(
    r"""(?P<name>[A-Za-z_][\w.-]*)(?P<sign>\s*[=:]\s*)(?P<value>(?>"(?:[^"\\]|\\.)*"|'[^']*'|[^\s;&|])+)"""
)
_IN_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://[^\s/:@]*:)[^\s/@]+@")


def is_secret_name(name: str) -> bool:
    """Returns whether a key or variable is named like a secret, such as `WANDB_API_KEY` or `hubToken`."""
    spaced = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name)
    return any(word in _WORDS for word in re.split(r"[^a-z0-9]+", spaced.lower()))


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Returns a text with `***` in place of secrets.

    It hides the value after a name that looks secret (`export HF_TOKEN=...`, `password: ...`), passwords in URLs, and
    every occurrence of the value of an environment variable whose name looks secret.
    """
    for value in _values(os.environ if environment is None else environment):
        text = text.replace(value, HIDDEN)
    text = _IN_URL.sub(rf"\g<scheme>{HIDDEN}@", text)
    return _ASSIGNMENT.sub(_hide, text)


def redact_values(values: Any, name: str = "") -> Any:
    """Returns nested plain values with `***` in place of secrets. Numbers and None are not secrets."""
    if isinstance(values, Mapping):
        return {key: redact_values(value, str(key)) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [redact_values(value, name) for value in values]
    if isinstance(values, str):
        return HIDDEN if values and is_secret_name(name) else redact(values)
    return values


def _hide(match: re.Match[str]) -> str:
    name = match["name"]
    sign = match["sign"]
    value = match["value"].rstrip(",)]}")
    tail = match["value"][len(value) :]
    if not is_secret_name(name):
        # The assigned value may itself contain an assignment.
        return f"{name}{sign}{_ASSIGNMENT.sub(_hide, value)}{tail}" if value[:1] not in "\"'" else _unquoted(match)
    is_plain = re.fullmatch(r"[\d.e+-]+|null|none|true|false|", value.lower()) is not None
    # After a colon, prose is more likely than a secret.
    is_prose = (
        ":" in sign and value[:1] not in "\"'" and not (len(value) >= _SHORTEST_VALUE and re.search(r"\d", value))
    )
    return match[0] if is_plain or is_prose else f"{name}{sign}{HIDDEN}{tail}"


def _unquoted(match: re.Match[str]) -> str:
    value = match["value"]
    return f"{match['name']}{match['sign']}{value[:1]}{_ASSIGNMENT.sub(_hide, value[1:])}"


def _values(environment: Mapping[str, str]) -> list[str]:
    """Returns the secret values of the environment, the longest first."""
    found = {
        value
        for name, value in environment.items()
        if is_secret_name(name) and name not in _FOLDERS and len(value) >= _SHORTEST_VALUE
    }
    return sorted(found, key=len, reverse=True)
