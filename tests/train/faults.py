"""Defines failures of one rank at a chosen operation of a run, and checks whether the run then ended correctly."""

import json
import os
import re
import signal
import time
from collections.abc import Hashable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from comm.exits import EXIT_HANG, EXIT_LOST
from tests.train.operation_hooks import watch_operations
from train.files.run_files import find_errors, read_error

How = Literal["killed", "stopped", "disconnected"]

DEADLINE_SECONDS = 4.0
GRACE_SECONDS = 5.0
WORLD_SIZE = 4


@dataclass(frozen=True, slots=True)
class Case:
    """A failure of rank `rank` before the `count`-th operation named `name`.

    Attributes:
        after: name of an operation after which the others are counted.
        overrides: overrides of this run, separated by spaces.
    """

    how: How
    rank: int
    phase: str
    name: str
    count: int = 1
    of: str = ""
    after: str = ""
    overrides: str = ""

    def __str__(self) -> str:
        return f"{self.how}-{self.rank}-{self.phase}".replace(" ", "-")


# With a node for each rank and long sequences, copies of experts across nodes pay.
ACROSS = "dispatch.balance=exact cluster.ranks_per_node=1 batch.sequence_length_tokens=512"
CASES = (
    Case("killed", 0, "start of the job", "start of the job"),
    Case("killed", 3, "creation of process groups", "creation of process groups"),
    Case("killed", 1, "exchange of counts", "exchange of counts", 3),
    Case("killed", 2, "dispatch", "dispatch", 4),
    Case("killed", 3, "combine", "combine", 5),
    Case("killed", 0, "pipeline transfer", "transfer", of="activation 0->1"),
    Case("killed", 1, "backward", "combine backward", 2),
    Case("killed", 2, "optimizer step", "update of the weights", 2),
    Case("killed", 3, "validation", "dispatch", 2, after="the step's record"),
    Case("killed", 0, "checkpoint", "checkpoint"),
    Case("killed", 1, "reduction", "sum of gradients of stage 1", 2),
    Case("killed", 3, "gathering of weights", "update of stage 0", 2),
    Case("stopped", 3, "start of the job", "start of the job"),
    Case("stopped", 0, "exchange of counts", "exchange of counts", 4),
    Case("stopped", 2, "backward", "dispatch backward", 3),
    Case("stopped", 2, "pipeline transfer", "transfer", of="gradient 1->0"),
    Case("stopped", 0, "optimizer step", "update of the weights", 2),
    Case("stopped", 3, "checkpoint", "checkpoint"),
    Case("disconnected", 1, "dispatch", "dispatch", 3),
    Case("disconnected", 0, "pipeline transfer", "transfer", of="activation 0->1"),
    Case("disconnected", 3, "optimizer step", "update of the weights", 2),
    Case("disconnected", 2, "validation", "exchange of counts", after="the step's record"),
    Case("killed", 2, "copies of experts", "weights of copies", 3, overrides=ACROSS),
    Case("killed", 1, "combine after copies", "combine", after="weights of copies", overrides=ACROSS),
    Case("stopped", 0, "combine after copies", "combine", 2, after="weights of copies", overrides=ACROSS),
    Case("disconnected", 3, "combine after copies", "combine", 3, after="weights of copies", overrides=ACROSS),
    Case("killed", 3, "gradients of copies", "gradients of copies", 2, overrides=ACROSS),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The outcome of a case: `seconds` from the failure to the end of the last rank, and whether all ranks `ended`."""

    case: Case
    exit_code: int
    seconds: float
    text: str
    ended: bool

    @property
    def names_rank(self) -> bool:
        """True if the message starts with the failed rank only."""
        return re.match(rf"rank {self.case.rank} (is lost|is absent|did not reach)\b", self.text) is not None

    @property
    def names_operation(self) -> bool:
        """True if the message names an operation that others waited for and in which the rank takes part."""
        found = re.search(r"ranks? [\d, and to]+ waited for (.+)$", self.text)
        if found is None:
            return False
        group = re.search(r"of group .*?([\d, >-]+)\]?\)", found[1])
        members = re.findall(r"\d+", group[1]) if group else [str(self.case.rank)]
        return str(self.case.rank) in members

    @property
    def is_right(self) -> bool:
        """True if the run ended in time with the right exit code, and named the failed rank and an operation."""
        code = EXIT_LOST if self.case.how == "killed" else EXIT_HANG
        in_time = self.ended and self.seconds <= DEADLINE_SECONDS + GRACE_SECONDS
        return in_time and self.exit_code == code and self.names_rank and self.names_operation


def choices(folder: Path, parallelism: str = "four_ranks") -> list[str]:
    """Returns the overrides of the run except its folder: the tiny model on the text in `folder`."""
    return [
        *("model=tiny", f"parallelism={parallelism}", "data=files", f"data.paths=[{folder / 'text'}]"),
        *(f"data.cache_dir={folder / 'cache'}", "data.tokenizer_vocab_size=320", "data.validation_fraction=0.2"),
        *("batch.sequence_length_tokens=32", "batch.global_sequences=8", "batch.micro_sequences=1"),
        *("validation.sequences=8", "validation.every_steps=1", "checkpointing.every_steps=1"),
        *("task.steps=3", "samples.prompt=", f"cluster.timeout_seconds={DEADLINE_SECONDS}"),
    ]


def write_case(case: Case, out_dir: Path) -> None:
    """Writes the case to the run's folder, from which its ranks read it."""
    (out_dir / "case.json").write_text(json.dumps(asdict(case)))


def arm(out_dir: Path) -> None:
    """Makes the case's rank fail at its operation. It then creates the file `failed`. Every rank calls this."""
    case = Case(**json.loads((out_dir / "case.json").read_text()))
    if os.environ["RANK"] != str(case.rank):
        return
    seen = [0, not case.after]

    def on_operation(name: str, label: Hashable | None) -> None:
        seen[1] |= name == case.after
        if seen[1] and name == case.name and str(label).startswith(case.of):
            seen[0] += 1
            if seen[0] == case.count:
                _fail(case.how, out_dir)

    watch_operations(on_operation)


def _fail(how: How, out_dir: Path) -> None:
    (out_dir / "failed").touch()
    match how:
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "disconnected":
            while not (out_dir / "cut").exists():
                time.sleep(0.01)


def failure_time(out_dir: Path) -> float:
    """Returns when the rank failed, in seconds since 1970."""
    return (out_dir / "failed").stat().st_mtime


def read_reports(out_dir: Path) -> dict[int, tuple[str, int]]:
    """Reads the reason and exit code of each rank's crash report, by rank."""
    found: dict[int, tuple[str, int]] = {}
    for path in find_errors(out_dir):
        word = read_error(path)
        found[int(path.name.split(".")[0].removeprefix("rank_"))] = word.text, word.code
    return found


def from_json(values: dict[str, Any]) -> Outcome:
    return Outcome(**{**values, "case": Case(**values["case"])})
