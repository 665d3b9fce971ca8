"""Remove secrets from checkpoints, exported files, results, logs and error messages."""

from __future__ import annotations

import re
from typing import Any

SECRET = {
    "token", "secret", "secrets", "key", "keys", "apikey", "apikeys", "accesskey", "secretkey", "privatekey",
    "auth", "authorization", "authentication", "bearer", "password", "passwords", "passwd", "passphrase", "pwd",
    "credential", "credentials", "header", "headers", "cookie", "cookies",
}  # fmt: skip
"""If a name contains one of these words, its text value is a secret."""

PASSWORD = {"secret", "password", "passwd", "passphrase", "pwd"}
"""If a name ends in one of these words, its number is a secret too. Other numbers, such as `pad_token`, are not."""

USERINFO = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^\s/?#]*@")
PARAMETER = re.compile(r"([?&;])([\w.-]+)=[^\s&;#'\"]+")


def words(name: str) -> list[str]:
    """Split a name into words, in lower case.

    >>> words("HF_TOKEN"), words("X-Api-Key"), words("HFToken2"), words("tokenizer_path")
    (['hf', 'token'], ['x', 'api', 'key'], ['hf', 'token'], ['tokenizer', 'path'])
    """
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def redact(value: Any, name: str = "") -> Any:
    """Copy a tree of mappings, lists and scalars without secrets: secret values become None, URLs lose their secrets.

    Args:
        value: Anything that YAML or JSON can hold.
        name: The key of the value. Everything nested under a secret key is secret.

    >>> redact({"api_key": "sk-1", "max_tokens": 7, "url": "http://me:pass@host/x", "headers": {"X-Team": "a"}})
    {'api_key': None, 'max_tokens': 7, 'url': 'http://host/x', 'headers': {'X-Team': None}}
    """
    if isinstance(value, dict):
        return {key: redact(item, f"{name}_{key}" if _is_secret(name) else str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, name) for item in value]
    if isinstance(value, str):
        return None if _is_secret(name) else strip_secrets(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return None if is_number and words(name)[-1:] and words(name)[-1] in PASSWORD else value


def strip_secrets(text: str) -> str:
    """Remove user and password from the URLs of a text, and replace secret query parameters by ***.

    >>> strip_secrets("see https://me:p@ss@host:8000/score?model=a&api_key=sk-1")
    'see https://host:8000/score?model=a&api_key=***'
    """

    def parameter(match: re.Match[str]) -> str:
        return f"{match[1]}{match[2]}=***" if _is_secret(match[2]) else match[0]

    return PARAMETER.sub(parameter, USERINFO.sub(r"\1", text))


def _is_secret(name: str) -> bool:
    return not SECRET.isdisjoint(words(name))
