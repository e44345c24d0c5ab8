"""Draws a page with sampled answers: tokens by log-probability or advantage, rewards, and filters.

Answers are hostile: they may hold HTML, scripts and control characters. They reach the page as JSON, and its script
writes them as text. The page's policy allows this script and style alone, by their digests, and no network.
"""

from html import escape
from pathlib import Path
from string import Template

from data.tokenizer import Tokenizer
from dualpipe.draw.document import document
from train.report.embed import embedded_json
from train.report.viewer.groups import group_data
from train.report.viewer.journals import JournalChoice, choose_groups, has_journals
from train.report.viewer.pieces import TokenPieces, find_tokenizer

VIEWER_NAME = "rollouts.html"
_TEMPLATE = Path(__file__).with_name("viewer.html")
_SCRIPT = Path(__file__).with_name("viewer.js")
_STYLE = Path(__file__).with_name("viewer.css")
_MOST_DATA_BYTES = 4_500_000
"""Size of the data of a page, which has at most 5 MB."""


class RolloutViewer:
    """Draws the rollouts of a run's folder. It keeps the decoded tokens between two pages."""

    def __init__(self, folder: Path, tokenizer: str | None) -> None:
        """Reads nothing yet.

        Args:
            tokenizer: the one that the configuration names; used until there is a checkpoint.
        """
        self._folder, self._given = folder, tokenizer
        self._path: Path | None = None
        self._pieces: TokenPieces | None = None

    @property
    def has_rollouts(self) -> bool:
        """Whether there is anything to draw."""
        return has_journals(self._folder)

    def html(self, name: str, about: str) -> str:
        """Returns the page.

        Args:
            name: of the run, plain text.
            about: a line on the run, plain text.

        Raises:
            OSError: a journal cannot be read.
        """
        choice, pieces = choose_groups(self._folder, _MOST_DATA_BYTES), self._open_pieces()
        data, num_shown = _group_list(choice, pieces)
        title = f"Rollouts of {name}"
        body = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
            title=escape(title),
            about=escape(about),
            shown=escape(_shown(choice, num_shown, has_pieces=pieces is not None)),
            data=data,
        )
        return document(title, body, _STYLE.read_text(encoding="utf-8"), _SCRIPT.read_text(encoding="utf-8"))

    def _open_pieces(self) -> TokenPieces | None:
        """Returns what decodes tokens; None if the run's tokenizer is not known or cannot be read."""
        path = find_tokenizer(self._folder, self._given)
        if self._pieces is None and path != self._path and path is not None:
            self._path = path
            try:
                self._pieces = TokenPieces(Tokenizer.load(path))
            except ValueError:
                return None
        return self._pieces


def _group_list(choice: JournalChoice, pieces: TokenPieces | None) -> tuple[str, int]:
    """Returns the groups as a JSON list of at most `_MOST_DATA_BYTES`, and their number."""
    most_bytes = _MOST_DATA_BYTES // max(len(choice.groups), 1)
    found, num_bytes = [], 2
    for group in choice.groups:
        text = embedded_json(group_data(group, pieces, most_bytes))
        num_bytes += len(text.encode("utf-8")) + 1
        if num_bytes > _MOST_DATA_BYTES:
            break
        found.append(text)
    return f"[{','.join(found)}]", len(found)


def _shown(choice: JournalChoice, num_groups: int, *, has_pieces: bool) -> str:
    """Returns a line that says what the page shows and what it leaves out."""
    rollouts = f"{choice.num_rollouts_of_run:,} rollouts"
    if choice.num_rollouts < choice.num_rollouts_of_run:
        rollouts = f"{choice.num_rollouts:,} of {rollouts}, evenly chosen"
    groups = f"{num_groups:,} groups"
    if num_groups < choice.num_groups:
        groups = f"{num_groups:,} of {choice.num_groups:,} groups, evenly chosen,"
    notes = "" if has_pieces else " Answers are shown as text, because the run has no tokenizer yet."
    return f"{groups} of {rollouts}. The folder rollouts has all of them.{notes}"
