"""Which names and values are treated as secrets."""

from __future__ import annotations

import time

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
        {"token_variable": "SCORES", "tokenVariable": "SCORES"},  # the name of an environment variable
        {"pad_token": 3, "key": None, "use_auth": True},
        {"scale": 1e-4, "names": ["a", "b"], "text": "a: b@c, see http://host/@me"},
    ],
)
def test_other_values_are_unchanged(tree: dict[str, object]) -> None:
    assert redact(tree) == tree


def test_a_variable_under_a_secret_name_is_secret() -> None:
    assert redact({"headers": {"X-Variable": "s3cret", "token_variable": ["s3cret"]}}) == {
        "headers": {"X-Variable": None, "token_variable": [None]}
    }


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
        ("https://host/x?sv=1&sig=a%2Bb&e=2", "https://host/x?sv=1&sig=***&e=2"),
        ("https://host/x?X-Amz-Signature=ab&signature=cd", "https://host/x?X-Amz-Signature=***&signature=***"),
        ("https://host/x?significance=1&design=2", "https://host/x?significance=1&design=2"),
        ("a" * 50 + "://me:pass@host", "a" * 50 + "://host"),
        ("me@host.org", "me@host.org"),
    ],
)
def test_urls(text: str, expected: str) -> None:
    assert strip_secrets(text) == expected
    assert redact({"url": text, "list": [text]}) == {"url": expected, "list": [expected]}


@pytest.mark.parametrize("part", ["a-", "a://", "?a", "A", "://a:", "&a="])
def test_long_texts_take_linear_time(part: str) -> None:
    begin = time.perf_counter()
    strip_secrets(part * 50_000)
    assert time.perf_counter() - begin < 1


def test_the_identity_of_a_reward_has_no_secret() -> None:
    reward = RemoteReward("http://me:pass@host/v1")
    assert reward.identity["url"] == "http://host/v1"
