"""Which names and values are treated as secrets."""

from __future__ import annotations

import pytest

from rewards import RemoteReward
from rewards.redaction import redact, strip_secrets


@pytest.mark.parametrize(
    "name",
    ["token", "secret", "apikey", "api_key", "key", "auth", "authorization", "Authorization", "password", "headers",
     "credential", "credentials", "HF_TOKEN", "apiKey", "X-Api-Key", "access_token", "client_secret", "HFToken"],
)  # fmt: skip
def test_names_of_secrets(name: str) -> None:
    assert redact({name: "s3cret"}) == {name: None}
    assert redact({"init_args": [{name: "two\nlines"}]}) == {"init_args": [{name: None}]}
    assert redact({name: {"class_path": "Basic", "list": ["a", {"b": "c"}]}}) == {
        name: {"class_path": None, "list": [None, {"b": None}]}
    }


@pytest.mark.parametrize(
    "tree",
    [
        {"max_tokens": "7", "tokenizer_path": "a/b", "monkey": "x", "author": "me", "keyboard": "y", "heading": "z"},
        {"pad_token": 3, "key": None, "use_auth": True},
        {"scale": 1e-4, "names": ["a", "b"], "text": "a: b@c, see http://host/@me"},
    ],
)
def test_other_values_are_unchanged(tree: dict[str, object]) -> None:
    assert redact(tree) == tree


def test_a_password_may_be_a_number() -> None:
    assert redact({"password": 1234, "db_password": 1.5}) == {"password": None, "db_password": None}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://me:pass@host:80/v1", "http://host:80/v1"),
        ("http://token@host", "http://host"),
        ("postgresql+psycopg://me:p@ss@host/db and s3://a:b@c", "postgresql+psycopg://host/db and s3://c"),
        ("https://host/@me?q=a@b", "https://host/@me?q=a@b"),
        ("https://host/x?model=m&access_token=abc&n=1", "https://host/x?model=m&access_token=***&n=1"),
        ("me@host.org", "me@host.org"),
    ],
)
def test_urls(text: str, expected: str) -> None:
    assert strip_secrets(text) == expected
    assert redact({"url": text, "list": [text]}) == {"url": expected, "list": [expected]}


def test_the_identity_of_a_reward_has_no_secret() -> None:
    reward = RemoteReward("http://me:pass@host/v1?key=abc")
    assert reward.identity["url"] == "http://host/v1?key=***"
