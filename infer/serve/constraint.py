"""Structured output: grammars that limit the tokens of an answer, by llguidance. Imports no torch."""

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.chat.messages import ToolDefinition
from data.chat.templates import ChatTemplate, Pieces
from data.corpus import describe, refusal
from data.tokenizer import Tokenizer
from infer.serve.fields import ApiError

_FORMATS = {"json": "json_schema"}
_MOST_CHARACTERS = 2**18


class GrammarConstraint:
    """The tokens that a grammar allows after those that were accepted. Implements `TokenConstraint`."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def allowed(self) -> NDArray[np.bool_]:
        """Returns whether each token may be next, [V]; none if the grammar became too complex."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            return np.zeros(self._vocab_size, dtype=np.bool_)
        return np.unpackbits(packed, count=self._vocab_size, bitorder="little").astype(np.bool_)

    def accept(self, token: int) -> None:
        """Advances by a token that was chosen."""
        self._matcher.consume_token(token)

    def copy(self) -> "GrammarConstraint":
        """Returns a constraint that advances separately."""
        return GrammarConstraint(self._matcher.deep_copy(), self._vocab_size)


class Grammars:
    """Builds constraints for a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, end_ids: Sequence[int], vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._end_ids = list(end_ids)
        self._vocab_size = vocab_size

    @property
    def is_available(self) -> bool:
        """Whether the package that builds grammars is installed."""
        return find_spec("llguidance") is not None

    @cached_property
    def _backend(self) -> Any:
        from llguidance import LLTokenizer

        text = self._tokenizer.serialized
        return LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._end_ids)

    def build(self, place: str, kind: str, value: Any, thoughts_end: Pieces = ()) -> GrammarConstraint:
        """Returns the constraint of a grammar: `json` (a schema), `regex`, `choice`, `grammar` or `lark`.

        Args:
            place: field of the request that has the grammar.
            thoughts_end: pieces that end thoughts, which precede the constrained answer.
        """
        types = {"json": dict | str, "choice": list}
        if value == [] or not isinstance(value, types.get(kind, str)):
            rule = f"must be {'an object' if kind == 'json' else 'text, or a list that is not empty'}"
            raise refusal(place, rule, describe(value), "{}")
        try:
            from llguidance import LLMatcher, grammar_from
        except ImportError as error:
            message = f"{place}: structured output needs the extra structured: pip install '.[structured]'"
            raise ApiError(400, message, place, "missing_extra") from error
        try:
            text = value if isinstance(value, str) else json.dumps(value)
            if len(text) > _MOST_CHARACTERS:  # llguidance takes quadratic time for choices
                raise ValueError(f"longer than at most {_MOST_CHARACTERS} characters")
            text = grammar_from(_FORMATS.get(kind, kind), text)  # type: ignore[arg-type]
            answer = (
                {"lark_grammar": text} if kind in ("lark", "grammar", "choice") else json.loads(text)["grammars"][0]
            )
            grammars = [{**answer, "name": "answer"}]
            if thoughts_end:
                start = f"start: THOUGHTS {self._literal(thoughts_end)} @answer\nTHOUGHTS: /(?s:.*)/"
                grammars.insert(0, {"lark_grammar": start})
            matcher = LLMatcher(self._backend, json.dumps({"grammars": grammars}), log_level=0)
            matcher.compute_bitmask()  # finds most problems here, and not on the engine's thread
            problem = matcher.get_error()
        except (ValueError, TypeError) as error:
            problem = str(error)
        if problem:
            raise refusal(place, "must be a grammar", " ".join(problem.split())[:200], "a simpler one")
        return GrammarConstraint(matcher, self._vocab_size)

    def build_call(
        self, tools: Iterable[ToolDefinition], template: ChatTemplate, thoughts_end: Pieces
    ) -> GrammarConstraint:
        """Returns the constraint of one call of one of the tools, as the template writes it."""
        form = template.tools
        options = []
        for tool in tools:
            name = json.dumps(tool.name)
            schema = json.dumps({"type": "object", **json.loads(tool.parameters)})
            begin = self._literal((*form.calls_begin, *form.call_begin))
            end = self._literal((*form.call_end, *form.calls_end))
            options.append(f"{begin} {name} {self._literal(form.separator)} %json {schema} {end}")
        return self.build("tool_choice", "lark", f"start: {' | '.join(options)}", thoughts_end)

    def _literal(self, pieces: Pieces) -> str:
        """Returns pieces of a template in the grammar's syntax."""
        names = self._tokenizer.placed_names.values()
        parts = (
            f"<[{self._tokenizer.special_id(piece)}]>" if piece in names else json.dumps(piece, ensure_ascii=False)
            for piece in pieces
        )
        return " ".join(parts)
