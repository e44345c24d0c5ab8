"""Writes HTML documents with a policy that allows only their own script and style, and no network.

Pages show names, answers and errors that may be hostile. The policy blocks `style` attributes too, so they become
rules of the style sheet.
"""

import base64
import hashlib
import re
from html import escape
from pathlib import Path

_STYLE = Path(__file__).with_name("document.css")
_STYLE_ATTRIBUTE = re.compile(r'(?<=\s)style="([^"{}<>]*)"')


def document(title: str, body: str, style: str, script: str = "", *, has_images: bool = False) -> str:
    """Returns a whole document with images only as `data:` addresses.

    Args:
        body: HTML in which every outside string is escaped; its script elements must hold data only.
        style: style sheet, added to the one that all documents share.
        script: runs after the body was read; empty for none.
    """
    rules: dict[str, str] = {}
    body = _STYLE_ATTRIBUTE.sub(lambda match: f'data-style="{rules.setdefault(match[1], str(len(rules)))}"', body)
    style = (
        _STYLE.read_text(encoding="utf-8")
        + style
        + "".join(f'\n:root [data-style="{name}"]{{{rule}}}' for rule, name in rules.items())
    )
    policy = ["default-src 'none'", f"style-src '{_digest(style)}'", "base-uri 'none'", "form-action 'none'"]
    policy += ["require-trusted-types-for 'script'"]
    policy += [f"script-src '{_digest(script)}'"] if script else []
    policy += ["img-src data:"] if has_images else []
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{"; ".join(policy)}">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
{body}
{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}"
