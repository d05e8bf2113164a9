"""Names and addresses of processes as settings hold them."""

import re
from collections.abc import Sequence

from headrace.errors import ConfigError

MAX_PORT = 65535

_HOST = re.compile(r"[^\s/:@\[\]]+|\[[0-9A-Fa-f:.]+(%[\w.-]+)?\]")
"""A name, an IPv4 address, or an IPv6 address in brackets."""


def check_name(name: str) -> None:
    """Refuse a name that could not be told from others.

    Raises:
        ConfigError: it is empty, or holds white space or characters that do not print.
    """
    if not name or not name.isprintable() or any(letter.isspace() for letter in name):
        raise ConfigError(f"name wants a word that is unique in the cluster, found {name!r}", field="name")


def is_address(text: str) -> bool:
    """Return whether a text is host:port, as one can be connected to."""
    host, _, port = text.rpartition(":")
    return bool(_HOST.fullmatch(host)) and port.isdecimal() and 0 < int(port) <= MAX_PORT


def check_addresses(addresses: Sequence[str], field: str) -> None:
    """Refuse what is no list of addresses.

    Args:
        addresses: host:port each.
        field: Names the setting in errors.

    Raises:
        ConfigError: one has no host or no port, or stands there twice.
    """
    for address in addresses:
        if not is_address(address):
            raise ConfigError(
                f"{field} wants host:port, each with a port from 1 to {MAX_PORT}, found {address!r}", field
            )
    twice = next((address for address in addresses if addresses.count(address) > 1), None)
    if twice is not None:
        raise ConfigError(f"{field} names {twice!r} twice", field)
