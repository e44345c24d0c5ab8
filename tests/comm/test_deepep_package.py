"""A missing package or unsupported sizes of DeepEP are reported before a run starts."""

import importlib
import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from comm.dispatch.deepep.package import BufferShape, DeepEPError, check_available, load_package


def test_package_check_needs_no_torch() -> None:
    code = """
        import importlib.util, sys
        from comm.dispatch.deepep.package import DeepEPError, check_available
        importlib.util.find_spec = lambda name: None
        try:
            check_available()
        except DeepEPError as error:
            print(error, "torch" in sys.modules)
    """
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", textwrap.dedent(code)]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert "deepep needs the package deep_ep (github.com/deepseek-ai/DeepEP) and CUDA" in found.stdout, found.stderr
    assert found.stdout.endswith("nearest valid: dispatch=two_hop False\n")


def test_package_that_is_too_old_or_broken_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    check_available()
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(__version__="1.2.1"))
    with pytest.raises(DeepEPError, match=r"deep_ep 1\.2\.1 has no ElasticBuffer.*dispatch=two_hop"):
        load_package()

    def fail(name: str) -> None:
        raise ImportError("libnccl.so.2: cannot open")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(DeepEPError, match=r"does not load \(libnccl"):
        load_package()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 7000}, "multiple of 256, has 7000; nearest valid: 6912 or 7168"),
        ({"hidden_size": 128}, "has 128; nearest valid: 256,"),
        ({"num_choices": 33}, "1 to 32 experts per token, has 33; nearest valid: 32"),
        ({"max_tokens": 0}, "at least 1 token, has 0"),
    ],
)
def test_unsupported_shape_is_rejected(change: dict[str, int], message: str) -> None:
    sizes: dict[str, Any] = {"max_tokens": 8, "hidden_size": 256, "num_choices": 2, "timeout_seconds": 1.0}
    with pytest.raises(DeepEPError, match=message):
        BufferShape(**(sizes | change))
