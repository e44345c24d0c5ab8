"""The corpus that a run reads, held against what the run asks of it. No torch here."""

from data.corpus import DataError
from data.prepare import Prepared, prepare
from train.config import TrainConfig


def prepare_corpus(config: TrainConfig) -> Prepared:
    """Opens the run's corpus, building what is not in the cache.

    Raises:
        DataError: as `data.prepare.prepare`, or validation is asked for and its part fills no forward pass.
    """
    stage = config.stage
    prepared = prepare(config.data, stage.sequence_length_tokens)
    found = len(prepared.validation_tokens_NL)
    # A corpus that held nothing out, as one of a single document, trains without validation.
    if found and stage.validation_sequences and found < stage.global_batch_sequences:
        raise DataError(
            f"stage.validation_sequences: a validation pass reads stage.global_batch_sequences="
            f"{stage.global_batch_sequences} sequences, but data.validation_fraction={config.data.validation_fraction} "
            f"leaves {found} of {stage.sequence_length_tokens} tokens; nearest valid: stage.validation_sequences=0, "
            f"or a larger data.validation_fraction"
        )
    return prepared
