"""A prepared corpus: its training part and its held-out part. Imports no torch."""

# Shape legend: N sequences, L tokens per sequence.

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from data.mix.mixture import HeldOut, Mixture
from data.pack import SampleCounts
from data.registry import Part
from data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class LongDocuments:
    """The long documents of a prepared training part."""

    min_document_tokens: int  # tokens from which a document is long
    share: float  # share of the training sequences that hold long documents only
    num_sequences: int  # number of these sequences in the corpus; they precede all others
    tokens: int  # number of their tokens
    other_sequences: int  # number of the sequences without long documents
    other_tokens: int  # number of their tokens

    @property
    def own_share(self) -> float:
        """Share of the corpus's tokens that are in long documents."""
        return self.tokens / (self.tokens + self.other_tokens)

    @property
    def read_share(self) -> float:
        """Share of the tokens that the run reads that are in long documents."""
        return self.share_of(self.share, 1 - self.share)

    def share_of(self, num_long: float, num_others: float) -> float:
        """Returns the share of tokens in long documents, given how many sequences of both kinds are read."""
        long = num_long * self.tokens / max(self.num_sequences, 1)
        others = num_others * self.other_tokens / max(self.other_sequences, 1)
        return long / (long + others)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PreparedPart:
    """The packed sequences of one part. Its arrays are read from disk when they are indexed."""

    tokens_NL: NDArray[np.integer]  # token ids, uint16, int32 or int64
    positions_NL: NDArray[np.int32]  # position within the piece, int32; -1 for padding
    num_tokens: int  # number of tokens without padding
    # further values of the tokens by name, each [N, L, ...]; see `data.pack`.
    values: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prepared:
    """A prepared corpus."""

    tokenizer: Tokenizer  # the given tokenizer, or one that was trained on the training part
    train: PreparedPart
    validation: PreparedPart  # empty if no document was held out
    # entropy of the token frequencies in the validation part, over the tokens that a model predicts (not padding, not
    # the first token of a piece). No model that ignores context has a lower validation loss. Without a validation part,
    # the entropy of the training part.
    unigram_entropy_nats: float
    order: Mixture  # order in which runs read the training part
    held_out: HeldOut  # order in which runs read the validation part
    bytes_per_token: float  # UTF-8 bytes of text per token of the same part, without begin of sentence
    fingerprint: str  # SHA-256 of the arrays; equal if and only if two machines read the same samples
    # number of samples of each part; empty if the source has documents.
    counts: Mapping[Part, SampleCounts] = field(default_factory=dict)
    # long documents of the training part; None: they are packed with others.
    long_documents: LongDocuments | None = None
    is_mixture: bool = False  # whether what is read is also recorded by source, of which the order has the names

    @property
    def parts(self) -> Mapping[Part, PreparedPart]:
        """Both parts by name."""
        return {"train": self.train, "validation": self.validation}
