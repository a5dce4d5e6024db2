"""Which addresses img2ds_child.py asks at all. Standard library only."""

import ipaddress
from urllib.parse import urlsplit


def unusable(url: str) -> str | None:
    """Why an http address is not asked (a reason of data_prep/download/reasons.py), None if it is.

    urllib would count these for the host name or the network, which are not to blame. Browsers do
    not send the credentials of an address for an image of a page either.
    """
    try:
        parts = urlsplit(url)
        good = parts.port != 0 and bool(parts.hostname)
    except ValueError:  # such as a port above 65535
        good = False
    if not good:
        return "bad url"
    return None if parts.username is None else "credentials in url"


def is_public(text: str) -> bool:
    """Whether an IP address is neither private, loopback, link-local, multicast nor reserved."""
    address = ipaddress.ip_address(text)
    if address.version == 6:
        # Gateways hand these on to the IPv4 address that they hold: ::ffff:0:0/96, ::/96 (RFC
        # 4291), 2002::/16 (6to4, RFC 3056) and 64:ff9b::/96 (NAT64, RFC 6052).
        last = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        compatible = int(address) >> 32 == 0
        nat64 = address in ipaddress.ip_network("64:ff9b::/96")
        address = address.ipv4_mapped or address.sixtofour or address
        address = last if compatible or nat64 else address
    return address.is_global and not address.is_multicast
