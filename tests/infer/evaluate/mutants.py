"""Two wrong variants of each problem's reference solution: a replaced part, which must occur once."""

MUTANTS = {
    "run_lengths": (("runs[-1][0] == character", "character in dict(runs)"), ("runs[-1][1] + 1", "runs[-1][1]")),
    "merge_intervals": (("low <= merged", "low < merged"), ("max(merged[-1][1], high)", "high")),
    "roman": (("number >= value", "number > value"), ('(40, "XL")', '(40, "XXXX")')),
    "balanced": (
        ("return not open_brackets", "return True"),
        ("open_brackets.pop() != closing[character]", "not open_brackets.pop()"),
    ),
    "two_sum": (
        (
            "        if total - number in places:",
            "        places.setdefault(number, at)\n        if total - number in places:",
        ),
        ("(places[total - number], at)", "(at, places[total - number])"),
    ),
    "binary_search": (
        ("numbers[middle] < number", "numbers[middle] <= number"),
        ("numbers[low] == number else -1", "numbers[low] >= number else -1"),
    ),
    "transpose": (
        ("width = max((len(row) for row in rows), default=0)", "width = len(rows[0]) if rows else 0"),
        ("for at in range(width)]", "for at in range(width - 1)]"),
    ),
    "anagram_groups": (
        ('"".join(sorted(word))', "frozenset(word)"),
        ("return list(groups.values())", "return sorted(groups.values())"),
    ),
    "prime_factors": (
        ("divisor * divisor <= number", "divisor * divisor < number"),
        ("    if number > 1:\n        factors.append(number)\n", ""),
    ),
    "rotate": (("    steps %= len(items)\n", ""), ("steps %= len(items)", "steps = -steps % len(items)")),
    "edit_distance": (("above + (a != b)", "above + 2 * (a != b)"), ("row[j - 1] + 1, ", "")),
    "spiral": (("zip(*rows)][::-1]", "zip(*rows)]"), ("rows.pop(0)", "rows.pop()")),
    "longest_unique": (("max(start, last[character] + 1)", "last[character] + 1"), ("at - start + 1", "at - start")),
    "to_base": (
        ('"0123456789abcdef"[digit] + digits', 'digits + "0123456789abcdef"[digit]'),
        ('"-" + digits if number < 0 else digits', "digits"),
    ),
    "topological_order": (("min(ready)", "max(ready)"), ("            return None\n", "            return order\n")),
    "word_counts": (("(-item[1], item[0])", "-item[1]"), ('text.lower() + " "', "text.lower()")),
    "change": (("min(options) + 1", "max(options) + 1"), ("coin <= total", "coin < total")),
    "flatten": (("flat += flatten(value)", "flat += value"), ("flat.append(value)", "flat += str(value)")),
    "evaluate": (('tokens[0] in "+-":', 'tokens[0] in "+":'), ("else value - product()", "else value - total()")),
    "Queue": ((">= self.size", "> self.size"), ("self.items.pop(0)", "self.items.pop()")),
}
