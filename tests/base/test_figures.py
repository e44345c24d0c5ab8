"""Numbers and tables for people: as text and as HTML."""

import math

from base.figures import Html, aligned, bytes_text, plain, short, table


def test_numbers_have_three_digits_also_if_rounding_reaches_the_next_letter() -> None:
    assert [plain(value) for value in (0.0, 0.33033, 1797.4, 3e-5)] == ["0", "0.33", "1,800", "3e-05"]
    assert [short(value) for value in (0.0, 999.0, 3_145_728.0)] == ["0", "999", "3.15M"]
    assert [short(value) for value in (999.6, 999_600.0, -999_600_000.0)] == ["1k", "1M", "-1G"]
    assert [short(value) for value in (math.inf, math.nan)] == ["inf", "nan"]
    assert [bytes_text(value) for value in (12.0, 698_359_808.0, 999_999_999.0)] == ["12 B", "698 MB", "1 GB"]


def test_table_escapes_cells_that_are_not_html_and_names_its_region() -> None:
    written = table(("a<b", "c"), [("<i>", Html("<i>x</i>"))], text=[1], label='"all"')
    assert '<th scope="col">a&lt;b</th><th class="text" scope="col">c</th>' in written
    assert '<td>&lt;i&gt;</td><td class="text"><i>x</i></td>' in written
    assert 'aria-label="&quot;all&quot;"' in written
    assert "<th " not in table(("", ""), [("a", "b")])


def test_columns_of_lines_read_from_the_right_or_as_text_from_the_left() -> None:
    rows = [("name", "bytes", "note"), ("a", "1,000", ""), ("long name", "1", "x")]
    assert aligned(rows, text=[0, 2]) == ["name       bytes  note", "a          1,000", "long name      1  x"]
    assert aligned(rows, gap="|") == ["     name|bytes|note", "        a|1,000|", "long name|    1|   x"]
