"""Hooks of mkdocs: the README becomes the first page, and API pages are made from docstrings.

Links that leave the documentation lead to files of the repository. The site has no copy of them, so their text is kept
and the link is dropped.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
API = {
    "use": (
        "Train and generate",
        ["launch.api", "train.callbacks", "infer.config", "infer.engines.local", "infer.protocol", "data.tokenizer"],
    ),
    "model": ("Model", ["model.size", "model.pretrained", "model.hf.writer", "model.objective", "model.router"]),
    "dualpipe": (
        "Schedules",
        ["dualpipe.ir", "dualpipe.builder", "dualpipe.validate", "dualpipe.simulation", "dualpipe.draw.svg"],
    ),
    "comm": ("Exchange", ["comm.protocol", "comm.layout", "comm.groups", "comm.dispatch.build"]),
    "registries": (
        "Registries",
        [
            "base.registry",
            "dualpipe.registry",
            "comm.dispatch.registry",
            "train.tasks.registry",
            "train.optim.learning_rate",
            "kernels.attention",
            "data.registry",
        ],
    ),
}


def on_files(files: Files, config: Any) -> Files:
    """Adds the README as index.md, and a page for each group of modules."""
    readme = (ROOT / "README.md").read_text("utf-8")
    readme = re.sub(r"(\]\(|src=\"|srcset=\")docs/", r"\1", readme)
    files.append(File.generated(config, "index.md", content=readme))
    for name, (title, modules) in API.items():
        content = "\n\n".join([f"# {title}", *(f"::: {module}" for module in modules)])
        files.append(File.generated(config, f"api/{name}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Leads links of pages to the README to the first page, and drops links to other files of the repository."""
    markdown = markdown.replace("](../README.md", "](index.md")
    return re.sub(r"\[([^\]]+)\]\((?:\.\./[^)]*|[A-Z]+\.md)\)", r"\1", markdown)
