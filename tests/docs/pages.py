"""Reads the pages of the documentation: headings, links, and code blocks with the comments that say how they run."""

import json
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import ROOT
from tests.data.released_tokenizer import write_released

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
_COMMENT = re.compile(r"^<!-- (checked|shortened|not run|not composed): (.+) -->$")
_PAGE_COMMENT = re.compile(r"^<!-- page: run by (.+) -->$", re.MULTILINE)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block of a page.

    `mode` is `run`, `checked` (trainings are only composed), `shortened` (trainings do two steps), `not run` (commands
    are only composed) or `not composed`, with the reason that the page states.
    """

    page: Path
    line: int
    language: str
    text: str
    mode: str
    reason: str

    def __str__(self) -> str:
        """Returns the place: `docs/start.md:12`."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[str]:
        """Returns the shell commands of a bash block, continued lines joined, comments and empty lines left out."""
        joined = self.text.replace("\\\n", " ")
        return [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def blocks(page: Path) -> list[Block]:
    """Returns the fenced blocks of a page; an indented fence, as in a list, counts too."""
    found: list[Block] = []
    lines = page.read_text("utf-8").splitlines()
    start = None
    for number, line in enumerate(lines):
        if not line.strip().startswith("```"):
            continue
        if start is None:
            start = number
            continue
        comment = _COMMENT.match(lines[start - 1]) if start else None
        found.append(
            Block(
                page=page,
                line=start + 1,
                language=lines[start].strip().removeprefix("```"),
                text="\n".join(lines[start + 1 : number]) + "\n",
                mode=comment[1] if comment else "run",
                reason=comment[2] if comment else "",
            )
        )
        start = None
    assert start is None, f"{page}: a block that begins in line {(start or 0) + 1} has no end"
    return found


def make_stand_ins(folder: Path) -> None:
    """Makes what pages name and tests lack: terabytes of text and tokens, and the tokenizer of `DeepSeek-V3`."""
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.txt").touch()
    os.truncate(folder / "corpus" / "a.txt", 3 * 10**12)  # sparse
    (folder / "DeepSeek-V3").mkdir()
    write_released(folder / "DeepSeek-V3" / "tokenizer.json", ["some text"], highest_id=128_814)
    write_prepared(folder / "v3_tokens", folder / "DeepSeek-V3" / "tokenizer.json", 128_815)


def write_prepared(folder: Path, tokenizer: Path, vocab_size: int) -> None:
    """Writes what a start reads of a folder that launch.prepare made for `v3_671b`: it has no tokens."""
    source: dict[str, Any] = {"units": [], "train": {}, "validation": {}}
    report = {"sources": {"web": source}, "vocab_size": vocab_size, "token_dtype": "<u4"}
    folder.mkdir()
    (folder / "prepare.json").write_text(json.dumps(report), "utf-8")
    (folder / "settings.json").write_text('{"punctuation_newline_split": 0.05}', "utf-8")
    shutil.copy(tokenizer, folder / "tokenizer.json")


def runners_of(page: Path) -> list[str]:
    """Returns the tests that run all blocks of a page by themselves, if it names them."""
    match = _PAGE_COMMENT.search(page.read_text("utf-8"))
    return re.findall(r"tests/[\w/]+\.py", match[1]) if match else []


def _without_code(page: Path) -> str:
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "code", text)


def links(page: Path) -> list[str]:
    """Returns the targets of links and pictures, outside code."""
    return [match[1] or match[2] for match in _LINK.finditer(_without_code(page))]


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub and mkdocs make them from plain words."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    seen: Counter[str] = Counter()
    made = set()
    for heading in re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        made.add(slug if not seen[slug] else f"{slug}-{seen[slug]}")
        seen[slug] += 1
    return made
