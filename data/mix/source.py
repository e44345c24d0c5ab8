"""Registers mixtures as a source of text: a manifest, or a prepared folder. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from data.corpus import DataError
from data.mix.manifest import read_manifest
from data.registry import DATA_SOURCES, DataSource, DataSourceEntry
from data.shards import read_report
from data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureSource(DataSource):
    """Sources with weights, prepared as shards."""

    manifest: str | None  # a manifest; None: the one that the folder was prepared from
    folder: str | None  # a folder that launch.prepare wrote; None: the sources are prepared in the cache
    local_cache: str | None  # a folder on a local disk to which the shards are copied once; None: they are not


def _check(source: MixtureSource, tokenizer: Tokenizer | None) -> None:
    if source.manifest is None and source.folder is None:
        raise DataError(
            "data.manifest: a value is needed with data=mix; write data.manifest=MIX.yaml, or data.folder=FOLDER of "
            "launch.prepare"
        )
    if source.manifest is not None:
        read_manifest(Path(source.manifest))
    if source.folder is not None:
        read_report(Path(source.folder).expanduser())


DATA_SOURCES.register(
    "mix",
    DataSourceEntry(
        summary="sources mixed by weight, from a manifest or a folder of launch.prepare",
        config=MixtureSource,
        place=lambda source: f"data.folder: {source.folder}" if source.folder else f"data.manifest: {source.manifest}",
        check=_check,
    ),
)
