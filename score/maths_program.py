r"""Compares mathematical answers with SymPy and math-verify's parser, as a worker of a pool.

Requests are lines of JSON with `expected` and `found`, the contents of two boxes. Rules below read the form of an
answer: lists, intervals, relations, units, bases. Expressions go to the parser only in a form that it need not guess.
It reads `2(3)` as 5, `4 5` as 9 and `N` as `n`. What has no form, or two (`1/2x`), equals the same text only. Values
are exact, and what is not proven equal is wrong. It imports nothing from this project, so that it starts quickly.
"""

import json
import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import sympy

_SIGNS = {
    "\u2212": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "√": r"\sqrt ", "π": r"\pi ", "∞": r"\infty ",
    "∪": r"\cup ", "∈": r"\in ", "±": r"\pm ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∅": r"\emptyset ",
    "ℝ": r"\R ", "≈": r"\approx ", "\u00a0": r"\,", "\u2009": r"\,", "\u202f": r"\,",
}  # fmt: skip
_NAMES = "sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|ln|log|exp"
_SPELLINGS: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"\\(?:left|right|displaystyle|[bB]igg?[lr]?)(?![A-Za-z])|\\!", ""),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\leq?(?:slant)?(?![A-Za-z])|<=", r"\\le "),
    (r"\\geq?(?:slant)?(?![A-Za-z])|>=", r"\\ge "),
    (r"\\neq(?![A-Za-z])", r"\\ne "),
    (r"\\varnothing|\\\{\s*\\\}", r"\\emptyset "),
    (r"\\mathbb\s*\{?R\}?", r"\\R "),
    (r"(?<=\d)(?:\\[,;: ]|\{,\}|~)(?=\d{3}(?!\d))", ""),
    (r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|(?<=\S)~", " "),
    (r"\\([%$])", r"\1"),
    (r"\\(?:text|mathrm|textbf|textit|mbox|operatorname)\s*\{([^{}\\]*)\}", r'"\1"'),
    (r'"\s*([-+$.\d][^"]*|[ei]|)\s*"', r" \1 "),
    (r"^\s*\{([^{}]*)\}\s*$", r"\1"),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])", "°"),
    (r"(?<![\w.\\])([-+]?\d+(?:\.\d*)?|[-+]?\.\d+)[eE]([-+]?\d+)(?![\w.])", r"\1 \\times 10^{\2}"),
    (rf"(?<![\\A-Za-z])({_NAMES}|sqrt|pi)(?![A-Za-z])", r"\\\1"),
    (r"\*", r"\\cdot "),
    (r"\s+", " "),
    (r"(?<![.,;])[.,;] ?$", ""),
    (r'^ ?" ?(\(?[A-Z]\)?) ?" ?$', r"\1"),
)
"""Patterns and their one spelling. Words of `\\text` get quotes. One full stop ends a sentence; several are a hedge."""


class UnreadableError(ValueError):
    """No rule reads the text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MathsValue:
    """An answer.

    Attributes:
        kind: number, list (also a finite set), tuple (also an interval), set, relation, matrix, base or text.
        expression: of a number or a set; of a relation, the left side minus the right one.
        label: unit of a number, brackets of a tuple, sign of a relation, columns of a matrix, or text.
        name: `x` in `x = 3` or `x < 3`; empty if there is none.
    """

    kind: str
    expression: Any = None
    items: tuple["MathsValue", ...] = ()
    label: str = ""
    name: str = ""


def compare(expected: str, found: str) -> dict[str, str]:
    """Compares two answers: correct, wrong, or error if the expected answer cannot be read."""
    left = read(expected)
    right = read(found)
    if left.kind == "text" and left != right and (not left.label or re.search(r"[\\{}^]", left.label)):
        return {"outcome": "error", "detail": "the expected answer cannot be parsed"}
    return {"outcome": "correct" if are_equal(left, right) else "wrong", "detail": ""}


def read(text: str) -> MathsValue:
    """Returns the value of an answer; without a form, text without case and outer brackets."""
    text = re.sub("[⁻⁰¹²³⁴-⁹]+", lambda run: "^{" + unicodedata.normalize("NFKC", run[0]) + "}", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda sign: " " + unicodedata.normalize("NFKC", sign[0]).replace("\u2044", "/"), text)
    text = "".join(str(unicodedata.decimal(sign)) if sign.isdecimal() else _SIGNS.get(sign, sign) for sign in text)
    text = re.sub(r"^\s*\$([^$]*)\$\s*$", r"\1", text.replace('"', "''"))
    for pattern, spelling in _SPELLINGS:
        text = re.sub(pattern, spelling, text)
    try:
        return _read(text.strip())
    except UnreadableError:
        words = re.sub(r"\s*([^\w\s])\s*", r"\1", " ".join(text.replace('"', " ").split()))
        words = words[1:-1] if re.fullmatch(r"\([^()]*\)", words) else words
        return MathsValue(
            kind="text", label=words.casefold() if re.search(r"(?<![\\A-Za-z])[A-Za-z]{2}", words) else words
        )


# Forms, from the outside in.

_SEPARATORS = {",": ",", ";": ",", '"or"': "or", '"and"': ","}
_RELATIONS = {"=": "=", "<": "<", ">": ">", r"\le": "≤", r"\ge": "≥", r"\ne": "≠", r"\in": "∈"}
_FLIPPED = {">": "<", "≥": "≤"}
_DEEPEST = 30  # more brackets in brackets are no answer. The parser takes minutes for them.


def _split(text: str, marks: dict[str, str]) -> tuple[list[str], list[str]]:
    """Splits a text at marks outside of brackets; returns the parts and the marks' meanings."""
    parts = [""]
    meanings = []
    depth = 0
    for match in re.finditer(r'"[^"]*"|\\[A-Za-z]+ ?|\\.|.', text):
        piece = match[0].replace(" ", "")
        depth += (piece in ("(", "[", "{", r"\{", r"\langle")) - (piece in (")", "]", "}", r"\}", r"\rangle"))
        if depth > _DEEPEST:
            raise UnreadableError(text)
        if depth == 0 and piece in marks:
            meanings.append(marks[piece])
            parts.append("")
        else:
            parts[-1] += match[0]
    return [part.strip() for part in parts], meanings


def _read(text: str) -> MathsValue:
    text = re.sub(r'(?<=[^\s"])(?: *,)? (or|and) (?=[^\s"])', r'"\1"', text)
    if not re.search(r"[(\[{]", text):  # in brackets, commas separate
        text = re.sub(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])", lambda number: number[0].replace(",", ""), text)
    parts, marks = _split(text, _SEPARATORS)
    if marks:
        items = [_read(part) for part in parts]
        is_union = set(marks) == {"or"} and all(item.kind == "set" for item in items)
        return _union(items) if is_union else _list(items)
    parts, marks = _split(text, _RELATIONS)
    if marks:
        return _relate(parts, marks)
    parts, marks = _split(text, {r"\cup": ""})
    if marks:
        return _union([_read(part) for part in parts])
    if text in (r"\emptyset", r"\R"):
        reals = sympy.Interval(-sympy.oo, sympy.oo)
        return MathsValue(kind="list") if text == r"\emptyset" else MathsValue(kind="set", expression=reals)
    return _read_enclosed(text) or _quantity(text)


def _read_enclosed(text: str) -> MathsValue | None:
    """Returns the value of a numeral with a base, a matrix or a pair of brackets, or None."""
    if match := re.fullmatch(r"(\d[0-9A-F]*) ?_ ?(?:\{([^{}]*)\}|(\d))", text):
        return MathsValue(kind="base", label=re.sub(r"\W|base", "", match[1] + "_" + (match[2] or match[3])))
    if match := re.fullmatch(r"\\begin ?\{[pbB]?matrix\}((?:(?!\\begin).)*?)(?:\\\\ ?)?\\end ?\{[pbB]?matrix\}", text):
        rows = [[_read(cell.strip()) for cell in row.split("&")] for row in match[1].split(r"\\")]
        if len({len(row) for row in rows}) > 1:
            raise UnreadableError(text)
        return MathsValue(kind="matrix", items=tuple(cell for row in rows for cell in row), label=str(len(rows[0])))
    if match := re.fullmatch(r"(\\\{|\\langle|[(\[]) ?(.*?) ?(\\\}|\\rangle|[)\]])", text):
        parts, marks = _split(match[2], {",": ","})
        brackets = match[1] + match[3]
        if brackets == r"\{\}":
            return _list([_read(part) for part in parts])
        if marks and brackets in ("()", "[]", "(]", "[)", r"\langle\rangle"):
            return MathsValue(kind="tuple", items=tuple(_read(part) for part in parts), label=brackets)
    return None


def _list(items: Sequence[MathsValue]) -> MathsValue:
    members = [member for item in items for member in (item.items if item.label == "±" else (item,))]
    # The members of `x = 1 or x = 2` are 1 and 2.
    has_one_name = len({member.name for member in members}) == 1
    return MathsValue(kind="list", items=tuple(replace(value, name="") if has_one_name else value for value in members))


def _relate(parts: Sequence[str], marks: list[str]) -> MathsValue:
    """Returns the value of sides and the signs between them. `5 = 4` has none."""
    has_words = re.fullmatch(r"[fghP]\([A-Za-z]\)|(?:\\angle )?[A-Z]{2,3}", parts[0]) is not None and marks[0] == "="
    sides = [_read(part) for part in parts[has_words:]]
    name = parts[0] if has_words else _name(sides[0])
    values = sides[1:] if name and not has_words else sides
    numbers = [side.expression for side in sides if side.kind == "number" and not side.label]
    has_symbols = any(number.free_symbols for number in numbers)
    if any(side.name for side in sides):
        raise UnreadableError(parts)
    if marks == ["∈"] and name and (expression := _as_set(values[0])) is not None:
        return values[0] if values[0].kind == "list" else MathsValue(kind="set", expression=expression, name=name)
    is_value = name and not _name(values[-1])  # x = y is a relation
    if set(marks) == {"="} and (is_value or len(parts) > 2 or not has_symbols):
        if any(value.label != values[0].label or not are_equal(value, values[0]) for value in values):
            raise UnreadableError(parts)
        return replace(values[-1], name=name)
    if len(numbers) != len(parts):
        raise UnreadableError(parts)
    if marks[0] in _FLIPPED:
        sides = sides[::-1]
        numbers = numbers[::-1]
        marks = [_FLIPPED.get(mark, mark) for mark in marks[::-1]]
    relation = MathsValue(kind="relation", expression=numbers[0] - numbers[1], label=marks[0])
    # x < 3 is an interval.
    names = [_name(side) for side in sides]
    if len(numbers) == 2 and names[0] and not numbers[1].free_symbols:
        names = ["", *names]
        numbers = [-sympy.oo, *numbers]
        marks = ["<", *marks]
    elif len(numbers) == 2 and names[1] and not numbers[0].free_symbols:
        numbers = [*numbers, sympy.oo]
        marks = [*marks, "<"]
    if len(numbers) == 3 and names[1] and set(marks) <= {"<", "≤"}:
        ends = tuple(MathsValue(kind="number", expression=number) for number in numbers[::2])
        label = ("(" if marks[0] == "<" else "[") + (")" if marks[1] == "<" else "]")
        return replace(_union([MathsValue(kind="tuple", items=ends, label=label)]), name=names[1])
    if len(parts) != 2 or not has_symbols or relation.expression == 0 or relation.label == "∈":
        raise UnreadableError(parts)
    return relation


def _name(value: MathsValue) -> str:
    return str(value.expression) if value.kind == "number" and value.expression.is_Symbol and not value.label else ""


def _union(values: Sequence[MathsValue]) -> MathsValue:
    sets = [_as_set(value) for value in values]
    if any(subset is None for subset in sets) or len({value.name for value in values}) > 1:
        raise UnreadableError(values)
    return MathsValue(kind="set", expression=sympy.Union(*sets), name=values[0].name)


def _as_set(value: MathsValue) -> Any:
    """Returns the SymPy set of a list of numbers, or of an interval with ends in order, or None."""
    numbers = [item.expression for item in value.items if item.kind == "number" and not item.label]
    if value.kind == "list" and len(numbers) == len(value.items):
        return sympy.FiniteSet(*numbers)
    if value.kind == "tuple" and len(numbers) == len(value.items) == 2 and value.label[0] in "([":
        low, high = numbers
        has_infinity = (value.label[0] == "[" and low.is_infinite) or (value.label[1] == "]" and high.is_infinite)
        if low.is_extended_real and high.is_extended_real and (low < high) == sympy.true and not has_infinity:
            return sympy.Interval(low, high, value.label[0] == "(", value.label[1] == ")")
    return value.expression if value.kind == "set" else None


# Numbers with units.

_SPELLED_UNITS = (
    "mm millimeter millimetre,cm centimeter centimetre,m meter metre,km kilometer kilometre,inch in inche,ft foot feet,"
    "yd yard,mi mile,mg milligram,g gram,kg kilogram,lb pound,oz ounce,ml milliliter millilitre,l L liter litre,"
    "s sec second,min minute,h hr hour,day,week,month,year yr,° degree deg,rad radian,$ dollar,¢ cent,€ euro,£,"
    "% percent,unit,mph,people person,children child,men man,women woman,square sq sq.,cubic cu cu.,/ per"
)
_UNITS = {name: names.split()[0] for names in re.split(",", _SPELLED_UNITS) for name in names.split()}
_NO_NOUN = re.compile(
    r".{0,3}|.*(?:us|ss|is|ths|rds|nds|ions|ands|wards)|hundreds|dozens|pairs|halves|quarters|scores|times|perhaps|besides|"
    r"always|sometimes|does|others|squares|cubes|powers|factors|multiples"
)
"""Words with s at the end that count nothing, or that change the number before them."""
_WORDS = r'(?:"[^"]*"|[A-Za-z]{2,}(?: [A-Za-z]{2,})*)(?: ?\^ ?\{?[23]\}?)?'
_QUANTITY = re.compile(rf"(.*?[^A-Za-z\\_ ]|.*\\pi) ?([%°¢€£]|{_WORDS}(?: ?/ ?{_WORDS})?)")


def _unit(text: str) -> str:
    """Returns one spelling of a unit, or nothing if the text is none."""
    words = re.findall(r"[^\s/^]+|/|\^\d", re.sub(r'["{}]|(?<=\^) | (?=\^)', "", text.replace('"', " ")))
    units = []
    for word in words:
        is_noun = re.fullmatch(r"[a-z]+s", word) and not _NO_NOUN.fullmatch(word)
        unit = _UNITS.get(word) or _UNITS.get(word.lower().removesuffix("s")) or ""
        unit = unit or (word if is_noun or word[0] == "^" else "")
        units.append(unit)
        if len(units) > 1 and units[-2] in ("square", "cubic"):
            units[-2:] = [unit, "^2" if units[-2] == "square" else "^3"]
    # Two nouns side by side are no unit.
    has_two = any(left[:1] != "/" and right[:1] not in ("/", "^") for left, right in pairwise(units))
    return "" if has_two or "" in units else " ".join(units)


def _quantity(text: str) -> MathsValue:
    unit = ""
    if match := re.match(r"(-? ?)([$€£]) ?(?=[-\d.\\])", text):
        unit = match[2]
        text = match[1] + text[match.end() :]
    elif (match := _QUANTITY.fullmatch(text)) and not (match[2] == "°" and re.search(rf"\\(?:{_NAMES})", text)):
        unit = _unit(match[2])
        text = match[1] if unit else text
    if text.count(r"\pm") == 1:
        both = (MathsValue(kind="number", expression=_parse(text.replace(r"\pm", sign)), label=unit) for sign in "+-")
        return MathsValue(kind="list", items=tuple(both), label="±")
    return MathsValue(kind="number", expression=_parse(text), label=unit)


# Expressions.

_TOKEN = re.compile(
    r" *(?:(?P<n>\d*\.\d*\\(?:overline|bar|dot) ?\{\d+\}|\d+\.?\d*|\.\d+)"
    rf"|(?P<f>\\(?:{_NAMES})(?![A-Za-z])(?: ?_ ?(?:\{{\w+\}}|\d))?)"
    r"|(?P<c>\\(?:frac|sqrt|binom)(?![A-Za-z]))|(?P<constant>\\(?:pi|infty)(?![A-Za-z])|[ei](?!_))"
    r"|(?P<times>\\(?:cdot|times|div)(?![A-Za-z]))|(?P<left>\\l(?:floor|ceil)(?![A-Za-z]))|(?P<right>\\r(?:floor|ceil))"
    r"|(?P<s>(?:[A-Z]{2,3}|[A-Za-z]|\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|rho|sigma|tau|phi|varphi|omega)"
    r"(?![A-Za-z]))(?:_\w|_\{\w+\})?'?)|(?P<sign>[-+/^!()|{}\[\]]))"
)
_FORMS: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"(?<=\\frac) ?(\d) ?(\d)(?!\d)", r"{\1}{\2}"),
    (r"(?<=\\frac) ?(\d) ?(?=\{)", r"{\1}"),
    (r"(?<=\\frac)( ?\{[^{}]*\}) ?(\d)(?!\d)", r"\1{\2}"),
    (r"(?<=\\sqrt) ?(?:(\d)(?!\d)|\(([^()]*)\)|([a-z])(?![a-z]))", r"{\1\2\3}"),
    (r"\^ ?(-? ?\d+|-? ?[A-Za-z])(?![\d.])", r"^{\1}"),
    (r"\^ ?\(([^()]*)\)", r"^{\1}"),
    (r"\\sqrt ?\[([3579])\] ?\{ ?- ?(\d+)\}", r"(-\\sqrt[\1]{\2})"),
    (r"(?<![\d.])(\d+) ?\\frac ?\{(\d+)\} ?\{(\d+)\}", lambda match: _mixed(*match.groups())),
    (r"(?<![\d./])(\d+) (\d+) ?/ ?(\d+)(?! ?[\w.\\(])", lambda match: _mixed(*match.groups())),
    (r"([\d.]+|\\pi|[a-z]) ?°", r"(\1\\cdot \\frac{\\pi}{180})"),
)
_EXPONENT = r"(?:\^\{[^{}]*\})?"
_TWO_READINGS = re.compile(
    r"[ns)}!]n|!!|\}\^|[-+*/^][-+*/^]|(?<![c^}\]])\{|(?<!c)\[|"
    rf"/(?:[ns]|\([^()]*\)|c(?:\[[^]]*\])?(?:\{{[^{{}}]*\}})+){_EXPONENT}!?[sfc(|]|"
    rf"f{_EXPONENT}(?:\([^()]*\)[\^!]|[ns]+\(|(?!\()(?:[ns!]|\^?c?\{{[^{{}}]*\}})*[*/])"
)
"""Adjacent kinds of tokens that people read in two ways or not at all: `1/2x`, `2^3^2`, `sin x/2`, `4 5`."""


def _mixed(whole: str, upper: str, lower: str) -> str:
    if int(upper) >= int(lower):
        raise UnreadableError("a mixed number has a proper fraction")
    return rf"({whole}+\frac{{{upper}}}{{{lower}}})"


def _exact(number: str) -> str:
    """Returns a decimal as a fraction. Digits under a line repeat."""
    integer, decimals, period = re.findall(r"(\d*)\.?(\d*)(?:\D+(\d+)\})?$", number)[0]
    upper = int(f"0{integer}{decimals}{period}")
    lower = 10 ** len(decimals)
    if period:
        upper -= int(f"0{integer}{decimals}")
        lower *= 10 ** len(period) - 1
    return rf"(\frac{{{upper}}}{{{lower}}})" if decimals or period else integer


def _canonical(text: str) -> str:
    """Returns an expression of allowed tokens with one reading, in the parser's own spelling."""
    words = re.findall(r"[A-Za-z]{2,}|[fgh] ?\(", re.sub(r"\\[A-Za-z]+|_\{\w+\}", " ", text))
    # Products of letters are short, in small letters and without o, or x, y, z and a, b, c.
    if any(re.fullmatch(r"(?!.*o)[a-z]{2}|[abcxyz]{3}|[A-Z]{2,3}", word) is None for word in words):
        raise UnreadableError(text)
    for pattern, form in _FORMS:
        text = re.sub(pattern, form, text)
    canonical = ""
    codes = ""
    at = 0
    while at < len(text.rstrip()):
        match = _TOKEN.match(text, at)
        kind = match.lastgroup if match else None
        if match is None or kind is None:
            raise UnreadableError(text)
        token = match[kind]
        at = match.end()
        code = {"constant": "s", "times": "*", "left": "(", "right": ")", "sign": token}.get(kind, kind)
        if kind == "n":
            token = _exact(token)
        elif kind == "s":
            # The parser reads letters in many ways, but x with a number in one.
            token = "x_{" + str(int.from_bytes(re.sub(r"[{}\\]", "", token).encode())) + "}"
        # Products without a sign get one, except before the argument of a function.
        if re.search(r"(?:[)!][sfc(]|[ns}]\()$", codes + code) and not re.search(rf"f{_EXPONENT}$", codes):
            canonical += r"\cdot "
        canonical += token + " "
        codes += code
    if _TWO_READINGS.search(codes) or codes.count("|") > 2:
        raise UnreadableError(text)
    return canonical.strip()


def _parse(text: str) -> Any:
    from latex2sympy2_extended.latex2sympy2 import latex2sympy

    canonical = _canonical(text)
    try:
        parsed = latex2sympy(canonical, is_real=True, convert_degrees=False, normalization_config=None)
    except MemoryError:
        raise
    except Exception as error:  # of no narrower kind
        raise UnreadableError(text) from error
    if not isinstance(parsed, sympy.Expr):
        raise UnreadableError(text)
    expression = parsed.subs({symbol: sympy.I for symbol in parsed.free_symbols if symbol.name == "i"}).doit()
    if expression.has(sympy.nan, sympy.zoo):
        raise UnreadableError(text)
    return expression


# Equality.


def are_equal(left: MathsValue, right: MathsValue) -> bool:
    """Returns whether two values are proven equal."""
    if "relation" in (left.kind, right.kind) or (left.name and right.name and left.name != right.name):
        return _are_equal_relations(_as_relation(left), _as_relation(right))
    if "set" in (left.kind, right.kind):
        sets = _as_set(left), _as_set(right)
        return sets[0] is not None and bool(sets[0] == sets[1])
    if left.kind != right.kind:
        return False
    match left.kind:
        case "number":
            return _are_equal_quantities(left, right)
        case "list":
            return _are_equal_lists(left.items, right.items)
        case "tuple" | "matrix":
            has_same_form = left.label == right.label and len(left.items) == len(right.items)
            return has_same_form and all(map(are_equal, left.items, right.items))
        case _:
            return left.label == right.label != ""


def _are_equal_quantities(left: MathsValue, right: MathsValue) -> bool:
    """Returns whether two numbers are equal, of which one may lack the unit.

    A percentage is a fraction or, above 1, the number without its sign.
    """
    if (left.label == "%") != (right.label == "%"):
        percent, number = (left.expression, right) if left.label == "%" else (right.expression, left)
        is_above_1 = percent.is_extended_real and (abs(percent) > 1) == sympy.true
        is_equal = _is_zero(percent / 100 - number.expression) or (is_above_1 and _is_zero(percent - number.expression))
        return is_equal and not number.label
    has_same_unit = left.label == right.label or not left.label or not right.label
    return has_same_unit and (left.expression == right.expression or _is_zero(left.expression - right.expression))


def _are_equal_lists(left: Sequence[MathsValue], right: Sequence[MathsValue]) -> bool:
    """Returns whether two lists are equal without order. Several names must agree (`x = 1, y = 2`)."""
    needs_names = len({item.name for item in (*left, *right)}) > 1
    remaining = list(right)
    for item in left:
        candidates = [candidate for candidate in remaining if item.name == candidate.name or not needs_names]
        match = next((candidate for candidate in candidates if are_equal(item, candidate)), None)
        if match is None:
            return False
        remaining.remove(match)
    return not remaining


def _as_relation(value: MathsValue) -> MathsValue | None:
    if value.kind == "number" and value.name.startswith("x_") and not value.label:
        return MathsValue(kind="relation", label="=", expression=sympy.Symbol(value.name, real=True) - value.expression)
    return value if value.kind == "relation" else None


def _are_equal_relations(left: MathsValue | None, right: MathsValue | None) -> bool:
    """Returns whether one side is the other one times a number, which must be positive in an inequality."""
    if left is None or right is None or left.label != right.label:
        return False
    ratio = sympy.simplify(left.expression / right.expression)
    is_factor = ratio.is_number and ratio.is_finite and (ratio.is_positive or (ratio.is_nonzero and left.label in "=≠"))
    return bool(is_factor)


def _is_zero(difference: Any) -> bool:
    """Returns whether an expression is proven to be zero."""
    if difference.is_Rational or difference.has(sympy.oo, sympy.nan, sympy.zoo):
        return bool(difference == 0)
    symbols = sorted(difference.free_symbols, key=str)
    point = {symbol: sympy.Rational(-7 - 4 * number, 5 + number) for number, symbol in enumerate(symbols)}
    value = difference.subs(point).evalf(30)  # refutes most, at little cost
    if value.is_number and value.is_finite and abs(value) > sympy.Float("1e-20"):
        return False
    return difference.equals(0) is True


def main() -> None:
    """Answers requests until the input ends."""
    import logging
    import resource

    logging.disable(logging.CRITICAL)
    # A power tower asks for more memory than there is. Then the request fails, or the worker ends.
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]), int(sys.argv[1])))
    compare("1", r"\frac{1}{1}")  # imports and builds the parser
    _print({"ready": True})
    for line in sys.stdin:
        message = json.loads(line)
        try:
            reply = compare(message["expected"], message["found"])
        except MemoryError:
            reply = {"outcome": "timeout", "detail": "comparing took too much memory"}
        except Exception as error:
            # Counted apart from wrong answers: a faulty library would otherwise look like a model that knows nothing.
            reply = {"outcome": "error", "detail": f"{type(error).__name__}: {error}"[:200]}
        _print(reply)


def _print(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
