"""Who may ask a server for scores: not other people's web pages, and where a token is set only those who have it."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Collection
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
"""Names under which a machine knows itself."""


def guard(hosts: Collection[str] | None, allowed: Collection[str] = (), token: str | None = None) -> Any:
    """A middleware that refuses requests before their body is read.

    A browser asks on behalf of any page that it shows. Such a request names the page's site as its Origin; a page that has
    its own name lead to this machine (DNS rebinding) names that one as Host.

    Args:
        hosts: Names that a request may ask for as its Host. None: any.
        allowed: Names of sites whose pages may ask; pages of this server itself always may.
        token: What a request must bring as its bearer token. None: nothing.
    """

    @web.middleware
    async def checked(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
        if hosts is not None and host_name(host) not in hosts:
            raise web.HTTPForbidden(
                text=f"Host must be {', '.join(sorted(hosts))}. Found {host[:100]!r}. Name it by --allow_host"
            )
        if origin is not None and host_name(origin) not in allowed and origin.partition("://")[2].lower() != host.lower():
            raise web.HTTPForbidden(
                text=f"Origin must be this server's own, or none. Found {origin[:100]!r}. Name its host by --allow_host"
            )
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise web.HTTPUnauthorized(
                text="A request must bring this server's token. Found none or another. Set `token_variable` of RemoteReward",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return await handler(request)

    return checked


def hosts_of(address: str, allowed: Collection[str]) -> set[str] | None:
    """The Hosts that a server at an address answers to; None for any.

    >>> sorted(hosts_of("127.0.0.1", ["gpu1"])), hosts_of("0.0.0.0", []), sorted(hosts_of("0.0.0.0", ["gpu1"]))
    (['127.0.0.1', '::1', 'gpu1', 'localhost'], None, ['127.0.0.1', '::1', 'gpu1', 'localhost'])
    """
    return {*LOOPBACK, address, *allowed} - {"0.0.0.0", "::", ""} if allowed or is_loopback(address) else None


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def host_name(found: str) -> str | None:
    """The host of a Host header or an Origin, in lower case and without its port; None where there is none.

    >>> host_name("LocalHost:8000"), host_name("[::1]:8000"), host_name("https://a.b:1"), host_name("null"), host_name("[")
    ('localhost', '::1', 'a.b', 'null', None)
    """
    try:
        return urlsplit(found if "://" in found else f"//{found}").hostname
    except ValueError:
        return None
