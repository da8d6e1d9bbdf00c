"""This host's network interfaces, and which of them routes to another host. Standard library only; Linux.

gloo binds to the interface that has the address of this host's own name. Debian writes `127.0.1.1 HOSTNAME` into
/etc/hosts, so gloo picks loopback, which other hosts cannot reach. This module asks the kernel for the route instead.
"""

import array
import contextlib
import fcntl
import ipaddress
import re
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

_SIOCGIFCONF, _SIOCGIFFLAGS, _SIOCGIFMTU = 0x8912, 0x8913, 0x8921
_UP, _LOOPBACK, _RUNNING = 0x1, 0x8, 0x40
_IFREQ = 40  # bytes of a struct ifreq
_INSIDE = re.compile(r"(docker|veth|virbr|cni|flannel|podman|lxc|lxd)|br-[0-9a-f]{12}$")
"""Names of interfaces that only reach containers and virtual machines on this host."""


@dataclass(frozen=True)
class Interface:
    """A network interface.

    Attributes:
        name: `eth0`.
        addresses: its addresses, IPv4 first.
        up: whether it is enabled and has a carrier.
        loopback: whether it only reaches this host.
        mtu: maximum packet size in bytes.
    """

    name: str
    addresses: tuple[str, ...]
    up: bool
    loopback: bool
    mtu: int


def interfaces() -> list[Interface]:
    """Every interface of this host."""
    addresses = _addresses()
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # the interface was removed meanwhile
                flags, mtu = _ioctl(handle, _SIOCGIFFLAGS, name, "H"), _ioctl(handle, _SIOCGIFMTU, name, "i")
                up = bool(flags & _UP and flags & _RUNNING)
                found.append(Interface(name, tuple(addresses.get(name, ())), up, bool(flags & _LOOPBACK), mtu))
    return found


def _ioctl(handle: socket.socket, request: int, name: str, form: str) -> int:
    answer = fcntl.ioctl(handle, request, struct.pack("16s24x", name.encode()))
    return struct.unpack_from(form, answer, 16)[0]


def _addresses() -> dict[str, list[str]]:
    """Addresses by interface."""
    found: dict[str, list[str]] = {}
    buffer = array.array("B", bytes(_IFREQ * 512))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        answer = fcntl.ioctl(handle, _SIOCGIFCONF, struct.pack("iP", len(buffer), buffer.buffer_info()[0]))
    for at in range(0, struct.unpack_from("i", answer)[0], _IFREQ):
        name = bytes(buffer[at : at + 16]).partition(b"\0")[0].decode().partition(":")[0]
        found.setdefault(name, []).append(socket.inet_ntoa(bytes(buffer[at + 20 : at + 24])))
    table = Path("/proc/net/if_inet6")
    for line in table.read_text().splitlines() if table.exists() else ():
        digits, *_, name = line.split()
        found.setdefault(name, []).append(str(ipaddress.IPv6Address(bytes.fromhex(digits))))
    return found


def resolve(name: str) -> list[str]:
    """The addresses that a host name resolves to, preferred ones first; empty if it does not resolve."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(address[0]).partition("%")[0] for *_, address in found))


def is_loopback(address: str) -> bool:
    """Whether an address is loopback: 127.*, ::1."""
    return ipaddress.ip_address(address).is_loopback


def owner(address: str) -> Interface | None:
    """The interface that has an address."""
    return next((interface for interface in interfaces() if address in interface.addresses), None)


def local_address(address: str) -> str | None:
    """The source address that the kernel would use for packets to `address`; None without a route. Sends nothing."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as handle:
        try:
            handle.connect((address, 9))  # on a UDP socket this only looks up the route
        except OSError:
            return None
        return handle.getsockname()[0].partition("%")[0]


def answers(address: str, port: int) -> bool:
    """Whether a TCP connection to `address:port` succeeds within 3 s."""
    try:
        socket.create_connection((address, port), timeout=3).close()
    except OSError:
        return False
    return True


def outward(found: list[Interface]) -> list[Interface]:
    """Interfaces that may reach other hosts: up, with IPv4; those to containers only if there are no others."""
    able = [interface for interface in found if interface.up and not interface.loopback and ipv4(interface)]
    return [interface for interface in able if not _INSIDE.match(interface.name)] or able


def ipv4(interface: Interface) -> list[str]:
    """The IPv4 addresses of an interface that other hosts can use: without link-local ones."""
    return [address for address in interface.addresses if "." in address and not address.startswith("169.254.")]
