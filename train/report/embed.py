"""Embeds data in a page, however hostile its strings are."""

import json


def embedded_json(values: object) -> str:
    """Returns JSON for a script element. No value can end the element or open a comment in it.

    Args:
        values: without numbers that are not finite. Half characters (lone surrogates) become question marks.
    """
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return text.encode("utf-8", "replace").decode("utf-8")


def num_embedded_bytes(values: object) -> int:
    """Returns the number of bytes that values take in a page."""
    return len(embedded_json(values).encode("utf-8"))
