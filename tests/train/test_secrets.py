"""Tests that values with secret names and values of secret variables are hidden, and that other text is kept."""

import pytest

from train.files.secrets import is_secret_name, redact, redact_values


@pytest.mark.parametrize(
    "name", ["WANDB_API_KEY", "hubToken", "db.password", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "credentials", "api-key"]
)
def test_secret_names(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ["tokenizer", "sequence_length_tokens", "monkey", "keyboard", "data.paths", "seed"])
def test_other_names(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("export WANDB_API_KEY=abc123", "export WANDB_API_KEY=***"),
        ("export HF_TOKEN='a b c' && run", "export HF_TOKEN=*** && run"),
        ('password: "quoted \\" one", seed=3', "password: ***, seed=3"),
        ("s3://user:hunter2@host/path", "s3://user:***@host/path"),
        ("slurm.setup=[export A_KEY=xyz]", "slurm.setup=[export A_KEY=***]"),
        ("num_experts_per_token=8 token: 12 key=null", "num_experts_per_token=8 token: 12 key=null"),
        ("data.tokenizer=path task.steps=3", "data.tokenizer=path task.steps=3"),
        ("the value long-secret-value stands alone", "the value *** stands alone"),
        ("short is a word", "short is a word"),
        ('prompt="a_key=abcdef123 "', 'prompt="a_key=*** "'),
        ("out=a_key=abcdef123", "out=a_key=***"),
        ("export A_KEY=ab,cd)ef", "export A_KEY=***"),
        ('export A_KEY="unclosed', "export A_KEY=***"),
        ("export A_KEY=a'b c'd;next", "export A_KEY=***;next"),
        ("wandb_key: unknown key; did you mean x?", "wandb_key: unknown key; did you mean x?"),
        ("token: abcdef123456", "token: ***"),
    ],
)
def test_texts(text: str, shown: str) -> None:
    environment = {"MY_TOKEN": "long-secret-value", "OTHER_KEY": "short", "HOME": "/home/someone"}
    assert redact(text, environment) == shown


def test_nested_values() -> None:
    values = {
        "num_experts_per_token": 8,
        "api_key": "x",
        "deep": [{"password": "y", "name": "HF_TOKEN=z"}],
        "none": None,
    }
    hidden = {"num_experts_per_token": 8, "api_key": "***", "deep": [{"password": "***", "name": "HF_TOKEN=***"}]}
    assert redact_values(values) == {**hidden, "none": None}


def test_folder_variables_of_a_shell_are_no_passwords() -> None:
    environment = {"PWD": "/home/user/a-folder", "OLDPWD": "/home/user/another", "DB_PWD": "a-long-password"}
    text = "in /home/user/a-folder, before in /home/user/another, with a-long-password"
    assert redact(text, environment) == "in /home/user/a-folder, before in /home/user/another, with ***"
