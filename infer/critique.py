"""Text of a generative reward model: it criticizes an answer, then says whether it approves.

The score is the probability of the approving verdict. Source: arXiv:2412.19437, section 5.2.1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data.chat.encode import encode_conversations
from data.chat.messages import ChatMessage, Conversation, user
from data.chat.templates import ChatTemplate
from data.tokenizer import Tokenizer
from infer.reward import VerdictTokens


@dataclass(frozen=True, kw_only=True, slots=True)
class CritiqueForm:
    """Strings around a question, an answer and a critique."""

    question: str = (
        "Question:\n{prompt}\n\nAnswer:\n{answer}\n\nIs the answer right? Explain, and end with Verdict: yes or "
        "Verdict: no."
    )
    before_verdict: str = "\nVerdict:"
    yes: str = " yes"
    no: str = " no"


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedAnswer:
    """An answer with a critique of it, and, for training, whether the critique approves."""

    prompt: str
    answer: str
    critique: str
    approves: bool = True
    form: CritiqueForm = CritiqueForm()

    def record(self) -> Mapping[str, Any]:
        """Returns the line of a `.jsonl` file that `data=chat` reads, to train a judge."""
        return {"prompt": self._question(), "answer": self._text(approves=self.approves)}

    def tokens(self, template: ChatTemplate, tokenizer: Tokenizer) -> VerdictTokens:
        """Returns the tokens whose probabilities are the verdict.

        The verdicts begin where both answers first differ in tokens, as a token may hold text before the verdict, too.
        """
        conversations = [
            Conversation(
                messages=(user(self._question()), ChatMessage(role="assistant", content=self._text(approves=approves))),
                num_context=1,
            )
            for approves in (True, False)
        ]
        yes, no = (chat.ids[:-1] for chat in encode_conversations(conversations, template, tokenizer))
        shared = next((place for place, both in enumerate(zip(yes, no, strict=False)) if both[0] != both[1]), None)
        shared = min(len(yes), len(no)) if shared is None else shared
        return VerdictTokens(prompt=tuple(yes[:shared]), yes=tuple(yes[shared:]), no=tuple(no[shared:]))

    def _question(self) -> str:
        # Not str.format, because an answer may contain braces.
        return self.form.question.replace("{answer}", "\0").replace("{prompt}", self.prompt).replace("\0", self.answer)

    def _text(self, *, approves: bool) -> str:
        return f"{self.critique}{self.form.before_verdict}{self.form.yes if approves else self.form.no}"
