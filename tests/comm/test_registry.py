"""The registry of dispatchers needs no torch, and a file outside the checkout can add a dispatcher."""

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from comm.dispatch.registry import DISPATCHERS
from kernels.registry import UnknownNameError
from tests.comm.laws import LAWS

_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def counting(tmp_path: Path) -> Path:
    """Writes the wrapper of docs/extend.md and its YAML file."""
    page = (_ROOT / "docs" / "extend.md").read_text("utf-8")
    blocks = [block for block in re.findall(r"```(?:python|yaml)\n(.*?)```", page, re.DOTALL) if "counting" in block]
    path, values = tmp_path / "counting.py", tmp_path / "conf" / "dispatch" / "counting.yaml"
    values.parent.mkdir(parents=True)
    path.write_text(blocks[0], "utf-8")
    values.write_text(blocks[1], "utf-8")
    return path


def test_dispatchers_are_in_order_and_their_configs_name_them() -> None:
    assert DISPATCHERS.names()[:4] == ("local", "all_to_all", "two_hop", "deepep")
    for name, entry in DISPATCHERS.items():
        assert entry.name == name
        assert get_args(get_type_hints(entry.config)["kind"]) == (name,)
        assert entry.contract.settings


def test_unknown_dispatcher_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"dispatch.kind: must be one of local, .*, is .two_hops.; did you mean"):
        DISPATCHERS.get("two_hops")


def test_reading_dispatchers_needs_no_torch() -> None:
    code = (
        "import sys; from comm.dispatch.registry import DISPATCHERS; print(DISPATCHERS.names(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split(")")[1].strip() == "False"


@pytest.mark.long
@pytest.mark.parametrize(("change", "num_broken"), [("", 0), (" * 2", len(LAWS))], ids=["right", "wrong"])
def test_contract_suite_runs_over_a_dispatcher_from_a_file_outside(
    change: str, num_broken: int, counting: Path
) -> None:
    """A correct wrapper keeps all laws on two ranks; one that doubles rows breaks each of them."""
    text = counting.read_text("utf-8")
    counting.write_text(text.replace("inner.dispatch(rows_TD", f"inner.dispatch(rows_TD{change}"), "utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        f"--plugins={counting}",
    ]
    tests = ["tests/comm/test_dispatch.py", "-m", "not slow", "-k", "counting"]
    done = subprocess.run([*command, *tests], cwd=_ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == (1 if num_broken else 0), done.stdout + done.stderr
    counts = done.stdout.splitlines()[-1]
    assert int(counts.split(" passed")[0].split()[-1]) == len(LAWS) + 3 - num_broken, done.stdout


def test_run_takes_a_dispatcher_from_a_file_outside(counting: Path) -> None:
    command = [sys.executable, "-m", "launch.train", f"plugins=[{counting}]", "dispatch=counting", "config_only=true"]
    done = subprocess.run(
        [*command, "dispatch.print_every=7"], cwd=_ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kind: counting" in done.stdout
    assert "print_every: 7" in done.stdout
