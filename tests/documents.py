"""Checks pages: their content policy without a browser, and what headless Chromium makes of them."""

import base64
import hashlib
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest


def digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


class Elements(HTMLParser):
    """Scripts, styles, attributes and the policy of a page, as a browser reads them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.policy = ""
        self.texts: dict[str, list[str]] = {"script": [], "style": []}
        self.attributes: set[str] = set()
        self._open = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.attributes |= values.keys()
        if values.get("http-equiv") == "Content-Security-Policy":
            assert not self.policy, "two policies"
            assert not any(self.texts.values()), "the policy comes after a script or style"
            self.policy = values["content"] or ""
        self._open = tag if tag in self.texts and values.get("type") != "application/json" else ""
        if self._open:
            self.texts[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open][-1] += data


def check_policy(page: str, *, has_script: bool) -> None:
    """Requires a policy that allows this page's script and style by their digests, and no network."""
    elements = Elements(page)
    allowed = {name: values for name, *values in (each.split() for each in elements.policy.split("; "))}
    assert allowed.pop("default-src") == ["'none'"]
    assert allowed.pop("base-uri") == allowed.pop("form-action") == ["'none'"]
    assert allowed.pop("require-trusted-types-for") == ["'script'"]
    assert allowed.pop("img-src", ["data:"]) == ["data:"]
    assert allowed.pop("style-src") == [digest(text) for text in elements.texts["style"]]
    assert allowed.pop("script-src", []) == [digest(text) for text in elements.texts["script"]]
    assert len(elements.texts["script"]) == has_script
    assert not allowed, "directives that no page needs"
    blocked = {name for name in elements.attributes if name == "style" or name.startswith("on")}
    assert not blocked, "attributes that the policy blocks"


def with_style_attributes(page: str) -> str:
    """Returns a page with the rules of single elements in `style` attributes again, next to what they style."""
    rules = dict(re.findall(r':root \[data-style="(\d+)"\]\{(.*?)\}', page))
    return re.sub(r'data-style="(\d+)"', lambda match: f'style="{rules[match[1]]}"', page)


def browse(page: str, folder: Path, *options: str, script: str = "") -> str:
    """Returns a page after its scripts, as headless Chromium prints it. Requires that it logs no error.

    Args:
        options: of the browser, such as `--window-size=400,900`.
        script: runs after the page's own; the policy gets its digest.
    """
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("needs chromium")
    if script:
        page = page.replace("script-src ", f"script-src {digest(script)} ", 1)
        page = page.replace("</body>", f"<script>{script}</script></body>")
    path = folder / "browsed.html"
    path.write_text(page, "utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *options]
    command += [f"--user-data-dir={folder / 'browser'}", "--virtual-time-budget=5000", "--dump-dom", f"file://{path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout
