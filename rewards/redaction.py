"""Keeping secrets out of what leaves this machine: checkpoints, exported files, results, logs and error messages."""

from __future__ import annotations

import re
from typing import Any

SECRET = {
    "token", "secret", "secrets", "key", "keys", "apikey", "apikeys", "accesskey", "secretkey", "privatekey",
    "auth", "authorization", "authentication", "bearer", "password", "passwords", "passwd", "passphrase", "pwd",
    "credential", "credentials", "header", "headers", "cookie", "cookies",
}  # fmt: skip
"""Words of a name whose text is a secret."""

PASSWORD = {"secret", "password", "passwd", "passphrase", "pwd"}
"""Last words of a name whose number is a secret too; others, such as `pad_token`, are counts and places."""

USERINFO = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^\s/?#]*@")
PARAMETER = re.compile(r"([?&;])([\w.-]+)=[^\s&;#'\"]+")


def words(name: str) -> list[str]:
    """The words of a name, in lower case.

    >>> words("HF_TOKEN"), words("X-Api-Key"), words("HFToken2"), words("tokenizer_path")
    (['hf', 'token'], ['x', 'api', 'key'], ['hf', 'token'], ['tokenizer', 'path'])
    """
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def redacted(found: Any, name: str = "") -> Any:
    """A tree of mappings, lists and scalars without its secrets: null in their place, URLs without theirs.

    Args:
        found: Anything that YAML or JSON can hold.
        name: Of the key it is the value of. What lies below a secret's name is secret as well.

    >>> redacted({"api_key": "sk-1", "max_tokens": 7, "url": "http://me:pass@host/x", "headers": {"X-Team": "a"}})
    {'api_key': None, 'max_tokens': 7, 'url': 'http://host/x', 'headers': {'X-Team': None}}
    """
    if isinstance(found, dict):
        return {key: redacted(value, f"{name}_{key}" if _is_secret(name) else str(key)) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [redacted(value, name) for value in found]
    if isinstance(found, str):
        return None if _is_secret(name) else strip_secrets(found)
    is_number = isinstance(found, int | float) and not isinstance(found, bool)
    return None if is_number and words(name)[-1:] and words(name)[-1] in PASSWORD else found


def strip_secrets(text: str) -> str:
    """Text whose URLs have neither user and password nor a secret among their parameters.

    >>> strip_secrets("see https://me:p@ss@host:8000/score?model=a&api_key=sk-1")
    'see https://host:8000/score?model=a&api_key=***'
    """

    def parameter(match: re.Match[str]) -> str:
        return f"{match[1]}{match[2]}=***" if _is_secret(match[2]) else match[0]

    return PARAMETER.sub(parameter, USERINFO.sub(r"\1", text))


def _is_secret(name: str) -> bool:
    return not SECRET.isdisjoint(words(name))
