"""URLs of servers, and the tokens that they require."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from rewards.redaction import strip_secrets

ENDING = re.compile(r"[?#].*|(?<!/)/(score|chat/completions)/*$", re.DOTALL)
"""The end of a URL to which no path can be added: a query, a fragment, or the path of a request. After `//` is the host."""


def check_urls(owner: str, name: str, urls: str | Sequence[str]) -> list[str]:
    """Check the URL of a server, or the URLs of several, and return them without trailing slashes.

    Raises:
        ValueError: if one is not the URL of a web server, there is none, or one is given twice.
    """
    checked = [check_url(owner, name, url) for url in ([urls] if isinstance(urls, str) else urls)]
    if not checked or len(set(checked)) < len(checked):
        found = ", ".join(map(strip_secrets, checked)) or "none"
        raise ValueError(
            f"{owner}: `{name}` must be a URL, or a list with each server once. Found {found}. Correct the list."
        )
    return checked


def check_url(owner: str, name: str, url: str) -> str:
    """Check the URL of a web server and return it without a trailing slash.

    Raises:
        ValueError: if it is not the URL of a web server, or ends in a query, a fragment or the path of a request.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        scheme, mark, rest = url.rpartition("://")
        public_url = strip_secrets(f"{scheme}{mark}{rest.rpartition('@')[2]}")
        raise ValueError(
            f"{owner}: `{name}` must begin with http:// or https:// and name a host. Found '{public_url}'. "
            "Write it as http://host:8000."
        )
    if ending := ENDING.search(url):
        raise ValueError(
            f"{owner}: `{name}` must have no query, no fragment, and no path of a request, which the client adds. Found "
            f"'{strip_secrets(url)}'. Write it as {strip_secrets(url[: ending.start()])}."
        )
    return url.rstrip("/")


def proxy_of(url: str) -> str | None:
    """Return the proxy of a URL by the environment (http_proxy, https_proxy, no_proxy); None if there is none."""
    parts = urlsplit(url)
    return None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)


def is_token(text: str) -> bool:
    """Whether a text is a valid token for an HTTP header."""
    return bool(text) and text.isascii() and text.isprintable() and " " not in text


def read_token(owner: str, variable: str | None) -> str | None:
    """Read a bearer token from an environment variable, because others can read files and command lines.

    Args:
        owner: Name of the reward or command, for error messages.
        variable: Name of the variable. None: no token.

    Raises:
        ValueError: if the variable is not set or does not hold a valid token.
    """
    if variable is None:
        return None
    token = os.environ.get(variable, "")
    if not is_token(token):
        content = "another text" if token else "nothing"
        raise ValueError(
            f"{owner}: `token_variable` must name an environment variable with a token, of ASCII letters without spaces. "
            f"Found {content} in {variable}. Set it: export {variable}=$(openssl rand -hex 32)."
        )
    return token
