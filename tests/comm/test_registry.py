"""Dispatchers by name: reading them needs no torch, and a file outside the checkout can add one."""

import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from comm.dispatch.registry import DISPATCHERS
from kernels.registry import UnknownNameError
from tests.comm.laws import LAWS

_ROOT = Path(__file__).resolve().parents[2]

_WRAPPER = '''
"""A dispatcher that counts the rows that arrive, around the all-to-all."""

from dataclasses import dataclass, replace
from typing import Literal

from comm.config import AllToAllDispatchConfig
from comm.dispatch.registry import DISPATCHERS, Contract, ContractSetting


@dataclass(frozen=True, kw_only=True, slots=True)
class CountingDispatchConfig(AllToAllDispatchConfig):
    kind: Literal["counting"]
    unit: int


class CountingDispatcher:
    def __init__(self, inner, unit):
        self.num_local_experts = inner.num_local_experts
        self.num_units = 0
        self._inner = inner
        self._unit = unit

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def dispatch(self, rows_TD, weights_TK, handle):
        self.num_units += len(rows_TD) // self._unit
        return self._inner.dispatch(rows_TD{change}, weights_TK, handle)


def build(config, parts):
    return CountingDispatcher(DISPATCHERS.get("all_to_all").build(config, parts), config.unit)


DISPATCHERS.register(
    "counting",
    replace(
        DISPATCHERS.get("all_to_all"),
        name="counting",
        summary="counts rows",
        config=CountingDispatchConfig,
        build=build,
        contract=Contract(fields={{"unit": 2}}, settings={{"1+1": ContractSetting(nodes=(0, 1))}}),
    ),
)
'''


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


@pytest.mark.parametrize(("change", "num_broken"), [("", 0), (" * 2", len(LAWS))], ids=["right", "wrong"])
def test_contract_suite_runs_over_a_dispatcher_from_a_file_outside(
    change: str, num_broken: int, tmp_path: Path
) -> None:
    """A wrapper keeps all laws on two ranks; one that doubles rows breaks each of them."""
    path = tmp_path / "counting.py"
    path.write_text(_WRAPPER.format(change=change), "utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--plugins={path}"]
    tests = ["tests/comm/test_dispatch.py", "-k", "counting-1 or (counting and lane) or (counting and refuses)"]
    done = subprocess.run([*command, *tests], cwd=_ROOT, capture_output=True, text=True, timeout=300, check=False)
    counts = done.stdout.splitlines()[-1]
    assert done.returncode == (1 if num_broken else 0), done.stdout + done.stderr
    assert ("failed" in counts) == bool(num_broken)
    assert int(counts.split(" passed")[0].split()[-1]) == len(LAWS) + 3 - num_broken, done.stdout
