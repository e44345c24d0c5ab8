"""Names are unique, unknown ones get advice, and plugin files register entries or fail in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from base.registry import PluginError, Registry, UnknownNameError, closest, list_modules, load_plugins
from tests import ROOT

COLOURS = Registry[int]("paint.colour")
HERE = f"from {__name__} import COLOURS\n"


@pytest.fixture(autouse=True)
def few_colours():  # type: ignore[no-untyped-def]
    """Starts each test with two colors and leaves nothing behind."""
    COLOURS.remove(COLOURS.names())
    COLOURS.register("red", 1)
    COLOURS.register("reddish", 2)
    yield
    for name in [name for name in sys.modules if name.startswith("plugin_")]:
        del sys.modules[name]


def plugin(folder: Path, text: str, name: str = "colours.py") -> Path:
    path = folder / name
    path.write_text(HERE + text, "utf-8")
    return path


def test_registry_returns_what_was_registered_in_order() -> None:
    assert COLOURS.get("red") == 1
    assert COLOURS.names() == ("red", "reddish")
    assert dict(COLOURS.items()) == {"red": 1, "reddish": 2}
    assert "red" in COLOURS
    assert "blue" not in COLOURS


def test_registry_register_returns_the_entry_and_refuses_a_taken_name() -> None:
    assert COLOURS.register("blue", 3) == 3
    with pytest.raises(ValueError, match=r"^paint.colour: 'blue' is registered already, by .*test_registry"):
        COLOURS.register("blue", 4)
    assert COLOURS.get("blue") == 3


def test_registry_unknown_name_states_place_value_and_nearest() -> None:
    with pytest.raises(UnknownNameError) as error:
        COLOURS.get("rad")
    assert str(error.value) == "paint.colour: must be one of red, reddish, is 'rad'; did you mean red?"
    with pytest.raises(UnknownNameError, match=r"is 'zzzz'$"):
        COLOURS.get("zzzz")


def test_registry_choices_are_names_and_other_values_of_the_key() -> None:
    shapes = Registry[int]("paint.shape", also=("auto",))
    shapes.register("round", 1)
    assert shapes.choices() == ("round", "auto")
    assert "auto" not in shapes
    with pytest.raises(UnknownNameError, match=r"^paint.shape: must be one of round, auto, is 'aut'; did you mean"):
        shapes.get("aut")


def test_modules_of_a_package_are_named_without_being_imported() -> None:
    modules = list_modules("dualpipe.draw", first=("text", "svg"))
    assert modules[:2] == ["dualpipe.draw.text", "dualpipe.draw.svg"]
    assert modules[2:] == sorted(set(modules[2:]))


def test_closest_puts_beginnings_first_and_ignores_case() -> None:
    assert closest("DUAL", ["1f1b", "dualpipe", "dualpipe_v"]) == ["dualpipe", "dualpipe_v"]


def test_registry_modules_are_imported_on_first_use_and_keep_their_order(tmp_path: Path) -> None:
    """The second module is imported before the registry is used, and still comes second; a caller is last."""
    (tmp_path / "book.py").write_text(
        "from base.registry import Registry\nPAGES = Registry[int]('page', modules=('first', 'second'))\n"
    )
    for number, name in enumerate(("first", "second")):
        (tmp_path / f"{name}.py").write_text(f"from book import PAGES\nPAGES.register('{name}', {number})\n")
    code = (
        "import second, book, sys; book.PAGES.register('third', 3); print(*book.PAGES.names(), 'torch' in sys.modules)"
    )
    path = f"{ROOT}{os.pathsep}{tmp_path}"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["first", "second", "third", "False"], done.stderr


def test_load_plugins_imports_a_file_once(tmp_path: Path) -> None:
    path = plugin(tmp_path, "COLOURS.register('blue', 3)\n")
    (first,) = load_plugins([path])
    (second,) = load_plugins([str(path)])
    assert first is second
    assert COLOURS.get("blue") == 3
    assert sys.modules[first.__name__] is first


def test_load_plugins_replaces_the_entries_of_a_file_that_was_edited(tmp_path: Path) -> None:
    load_plugins([plugin(tmp_path, "COLOURS.register('blue', 3)\n")])
    load_plugins([plugin(tmp_path, "COLOURS.register('blue', 4)\nCOLOURS.register('green', 5)\n")])
    assert (COLOURS.get("blue"), COLOURS.get("green")) == (4, 5)


def test_load_plugins_accepts_two_files_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    paths = [
        plugin(tmp_path, "COLOURS.register('blue', 3)\n"),
        plugin(tmp_path / "other", "COLOURS.register('green', 5)\n"),
    ]
    assert len({module.__name__ for module in load_plugins(paths)}) == 2
    assert COLOURS.names() == ("red", "reddish", "blue", "green")


def test_load_plugins_finds_entries_of_a_registry_that_the_file_is_first_to_import(tmp_path: Path) -> None:
    text = "from base.registry import Registry\nOWN = Registry[int]('own')\nOWN.register('one', 1)\n"
    (module,) = load_plugins([plugin(tmp_path, text)])
    assert module.OWN.names() == ("one",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "registers nothing; call `register` of a registry, for example dualpipe.registry.SCHEDULES"),
        ("1 / 0\n", "fails at line 2: ZeroDivisionError: division by zero"),
        ("import nothing_of_this_name\n", "fails at line 2: ModuleNotFoundError: No module named"),
        ("def broken(:\n", "fails at line 2: SyntaxError: "),
        ("COLOURS.register('red', 3)\n", "fails at line 2: ValueError: paint.colour: 'red' is registered already"),
        ("raise ValueError('two\\nlines')\n", "fails at line 2: ValueError: two lines"),
        ("COLOURS.register('blue', 3)\n1 / 0\n", "fails at line 3: ZeroDivisionError: division by zero"),
    ],
)
def test_load_plugins_error_is_one_line_and_leaves_nothing_registered(tmp_path: Path, text: str, words: str) -> None:
    path = plugin(tmp_path, text)
    with pytest.raises(PluginError) as error:
        load_plugins([path])
    assert str(error.value).startswith(f"plugins: '{path}' {words}")
    assert "\n" not in str(error.value)
    assert COLOURS.names() == ("red", "reddish")
    load_plugins([plugin(tmp_path, "COLOURS.register('blue', 3)\n")])


def test_load_plugins_missing_file_names_the_nearest(tmp_path: Path) -> None:
    plugin(tmp_path, "", "colours.py")
    with pytest.raises(PluginError) as error:
        load_plugins([tmp_path / "colors.py"])
    wanted = f"plugins: must be python files, '{tmp_path}/colors.py' does not exist; did you mean colours.py?"
    assert str(error.value) == wanted


@pytest.mark.slow
def test_pytest_plugins_option_loads_files_for_suites(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    text = "from base.registry import Registry\nOWN = Registry[int]('own')\nOWN.register('two', 2)\n"
    path.write_text(text, "utf-8")
    test = "tests/base/test_registry.py::test_registry_returns_what_was_registered_in_order"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--plugins={path}", test]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
