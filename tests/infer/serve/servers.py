"""Servers with a small untrained model, on a thread of the test's process."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from data.chat.templates import CHAT_TEMPLATES
from data.special_tokens import CHAT_TOKENS
from data.tokenizer import Tokenizer
from infer.continuous import ContinuousEngine
from infer.serve.app import Service
from infer.serve.calls import ServedModel
from infer.serve.constraint import Grammars
from infer.serve.engine import EngineThread, ServingEngine
from infer.serve.http import DrainingServer, open_socket
from model.config import ModelConfig
from model.pretrained import save_hf
from tests.infer.models import SMALL, make_model

DOCUMENTS = ["The server answers: hello, world; héllo 你好.\n", '{"name": "weather", "arguments": [1, 2]}\n'] * 4
TOKENIZER = Tokenizer.train(DOCUMENTS, 340, CHAT_TOKENS)
MODEL = replace(SMALL, vocab_size=352, max_position_tokens=512)
MOST_OPEN = 64


def make_engine(config: ModelConfig = MODEL, **options: object) -> ContinuousEngine:
    defaults = {
        "max_sequences": 8,
        "cached_tokens": 8192,
        "chunk_tokens": 64,
        "speculative": False,
        "prefix_cache": True,
    }
    return ContinuousEngine(make_model(config), **{**defaults, **options})  # type: ignore[arg-type]


def describe(template: str | None = "v3_1", **changes: object) -> ServedModel:
    end = (TOKENIZER.special.eos,)
    served = ServedModel(
        name="tiny",
        tokenizer=TOKENIZER,
        template=None if template is None else CHAT_TEMPLATES.get(template),
        thinking=None,
        end_ids=end,
        vocab_size=MODEL.vocab_size,
        max_tokens=MODEL.max_position_tokens,
        most_choices=MOST_OPEN,
        grammars=Grammars(TOKENIZER, end, MODEL.vocab_size),
    )
    return replace(served, **changes)  # type: ignore[arg-type]


@dataclass
class RunningServer:
    url: str
    service: Service
    server: DrainingServer
    lines: list[str] = field(default_factory=list)


@contextmanager
def serving(
    engine: ServingEngine,
    served: ServedModel | None = None,
    *,
    api_key: str | None = None,
    most_open: int = MOST_OPEN,
    stall_seconds: float = 60,
    cors_origins: tuple[str, ...] = (),
) -> Iterator[RunningServer]:
    """Runs a server on a thread until exit, which drains it."""
    lines: list[str] = []
    thread = EngineThread(engine, most_open=most_open, stall_seconds=stall_seconds)
    service = Service(served or describe(), thread, api_key=api_key, write_line=lines.append, cors_origins=cors_origins)
    server = DrainingServer(service, drain_seconds=5)
    with open_socket("127.0.0.1", 0) as bound:
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        runner = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])))
        runner.start()
        try:
            while not server.started:
                assert runner.is_alive()
                runner.join(0.01)
            yield RunningServer(url, service, server, lines)
        finally:
            server.handle_exit(15, None)
            runner.join(20)
            assert not runner.is_alive()


def save_weights(folder: Path, config: ModelConfig = MODEL) -> Path:
    """Writes the model and its tokenizer as a folder that `launch` commands read."""
    save_hf(make_model(config), folder)
    TOKENIZER.save(folder / "tokenizer.json")
    return folder
