"""Writes the weights from which runs of a test start. It is separate, so that ranks do not import transformers."""

from pathlib import Path

from tests.model.hf_checkpoints import reference_model, save_checkpoint
from tests.tiny import write_text


def make_sources(folder: Path) -> Path:
    """Writes the text, and random checkpoints of transformers: `plain`, and `mtp` with an MTP module."""
    write_text(folder)
    sizes = {"vocab_size": 320, "max_position_embeddings": 64}
    reference_model(**sizes).save_pretrained(folder / "plain")
    save_checkpoint(folder / "mtp", num_files=3, **sizes)  # type: ignore[arg-type]
    return folder
