"""Access control of the reward server: refuse other sites' web pages, and require a token if one is set."""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from rewards.redaction import strip_secrets

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
"""Host names of the local machine."""
NAME = re.compile(r"[a-z0-9._-]+")
"""A host name in lower case, or an IPv4 address."""


def guard(hosts: Collection[str] | None, allowed: Collection[str] = (), token: str | None = None) -> Any:
    """Return a middleware that refuses requests before their body is read.

    Any web page in a browser can send requests to this server. Such a request has the page's site in its Origin header. If
    the page's host name resolves to this machine (DNS rebinding), the Host header contains that name.

    Args:
        hosts: Allowed names in the Host header. None: any.
        allowed: Names of sites with pages that may send requests; pages of this server are always allowed.
        token: Required bearer token. None: no token is required.
    """

    @web.middleware
    async def checked(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
        if hosts is not None and host_name(host) not in hosts:
            raise web.HTTPForbidden(
                text=f"Host must be {', '.join(sorted(hosts))}. Found {host[:100]!r}. Allow it with --allow_host"
            )
        if origin is not None and host_name(origin) not in allowed and origin.partition("://")[2].lower() != host.lower():
            raise web.HTTPForbidden(
                text=f"Origin must be this server's own, or none. Found {origin[:100]!r}. Allow its host with --allow_host"
            )
        authorization = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if token is not None and not hmac.compare_digest(authorization, f"Bearer {token}".encode()):
            raise web.HTTPUnauthorized(
                text="A request must have this server's token. Found none or another. Set `token_variable` of RemoteReward",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return await handler(request)

    return checked


def hosts_of(address: str, allowed: Collection[str]) -> set[str] | None:
    """Return the Host names that a server at an address accepts; None for any.

    >>> sorted(hosts_of("127.0.0.1", ["gpu1"])), hosts_of("0.0.0.0", []), sorted(hosts_of("0.0.0.0", ["gpu1"]))
    (['127.0.0.1', '::1', 'gpu1', 'localhost'], None, ['127.0.0.1', '::1', 'gpu1', 'localhost'])
    """
    return {*LOOPBACK, address, *allowed} - {"0.0.0.0", "::", ""} if allowed or is_loopback(address) else None


def check_hosts(names: Iterable[str]) -> list[str]:
    """Return host names in lower case.

    Raises:
        ValueError: if one is neither a host name nor an IP address, for instance because it has a scheme or a port.

    >>> check_hosts(["GPU1", "fe80::1"])
    ['gpu1', 'fe80::1']
    """
    lower = [name.lower() for name in names]
    for name in lower:
        if not NAME.fullmatch(name) and not is_address(name):
            raise ValueError(
                "`allow_host` must hold host names without scheme, port and path, such as gpu1, or IP addresses without "
                f"brackets. Found '{strip_secrets(name)}'. Write {host_name(name) or 'the name only'}."
            )
    return lower


def is_address(text: str) -> bool:
    """Whether a text is an IP address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach a server that listens at the address."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def host_name(header: str) -> str | None:
    """Return the host of a Host or Origin header, in lower case and without the port; None if there is none.

    >>> host_name("LocalHost:8000"), host_name("[::1]:8000"), host_name("https://a.b:1"), host_name("null"), host_name("[")
    ('localhost', '::1', 'a.b', 'null', None)
    """
    try:
        return urlsplit(header if "://" in header else f"//{header}").hostname
    except ValueError:
        return None
