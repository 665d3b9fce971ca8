"""Remove secrets from checkpoints, exported files, results, logs and error messages."""

from __future__ import annotations

import re
from typing import Any

SECRET = {
    "token", "secret", "secrets", "key", "keys", "apikey", "apikeys", "accesskey", "secretkey", "privatekey",
    "auth", "authorization", "authentication", "bearer", "password", "passwords", "passwd", "passphrase", "pwd",
    "credential", "credentials", "header", "headers", "cookie", "cookies",
}  # fmt: skip
"""If a name contains one of these words, its text value is a secret, unless the name ends in the word `variable`: then it
is the name of an environment variable."""

PASSWORD = {"secret", "password", "passwd", "passphrase", "pwd"}
"""If a name ends in one of these words, its number is a secret too. Other numbers, such as `pad_token`, are not."""

SIGNED = {"sig", "signature"}
"""If a query parameter contains one of these words, it is a secret: it signs the URL."""

USERINFO = re.compile(r"(?<=://)[^\s/?#]*@")
PARAMETER = re.compile(r"([?&;])([\w.-]+)=[^\s&;#'\"]+")


def words(name: str) -> list[str]:
    """Split a name into words, in lower case.

    >>> words("HF_TOKEN"), words("X-Api-Key"), words("HFToken2"), words("tokenizer_path")
    (['hf', 'token'], ['x', 'api', 'key'], ['hf', 'token'], ['tokenizer', 'path'])
    """
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def redact(value: Any, name: str = "", secret: bool = False) -> Any:
    """Copy a tree of mappings, lists and scalars without secrets: secret values become None, URLs lose their secrets.

    Args:
        value: Anything that YAML or JSON can hold.
        name: The key of the value. Everything nested under a secret key is secret.
        secret: Whether the value is nested under a secret key.

    >>> redact({"api_key": "sk-1", "max_tokens": 7, "url": "http://me:pass@host/x", "headers": {"X-Team": "a"}})
    {'api_key': None, 'max_tokens': 7, 'url': 'http://host/x', 'headers': {'X-Team': None}}
    """
    secret = secret or _is_secret(name)
    if isinstance(value, dict):
        return {key: redact(item, str(key), secret) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, name, secret) for item in value]
    if isinstance(value, str):
        return None if secret else strip_secrets(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return None if is_number and words(name)[-1:] and words(name)[-1] in PASSWORD else value


def strip_secrets(text: str) -> str:
    """Remove user and password from the URLs of a text, and replace secret query parameters by ***.

    >>> strip_secrets("see https://me:p@ss@host:8000/score?model=a&api_key=sk-1")
    'see https://host:8000/score?model=a&api_key=***'
    """

    def parameter(match: re.Match[str]) -> str:
        secret = _is_secret(match[2]) or not SIGNED.isdisjoint(words(match[2]))
        return f"{match[1]}{match[2]}=***" if secret else match[0]

    return PARAMETER.sub(parameter, USERINFO.sub("", text))


def _is_secret(name: str) -> bool:
    parts = words(name)
    return not SECRET.isdisjoint(parts) and parts[-1] != "variable"
