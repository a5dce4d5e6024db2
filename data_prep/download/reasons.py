"""Why an image was not kept: img2dataset's status messages, grouped.

img2dataset 1.47 stores the text of whatever exception it met. The same cause has many texts (a
host name, a byte count, or OpenCV's version are part of them), so counts are kept by group.
"""

import re

SUCCESS = "success"
OPT_OUT = "opt-out"
DNS = "dns"
PRIVATE = "private address"
OTHER = "other"

# First match wins. The quoted texts of img2ds_child.py come first: they are ours and exact.
_GROUPS = (
    (SUCCESS, r"^success$"),
    (OPT_OUT, r"X-Robots-Tag"),
    ("too large", r"^(<urlopen error )?too large"),
    ("too slow", r"^(<urlopen error )?too slow"),
    (PRIVATE, r"^(<urlopen error )?private address"),
    ("credentials in url", r"^credentials in url"),
    ("bad url", r"^bad url"),
    ("http 204", r"^http 204$"),
    ("empty body", r"^empty body$"),
    ("compressed body", r"^compressed body"),
    ("html page", r"^html page$"),
    ("svg", r"^svg$"),
    ("json", r"^json$"),
    ("pdf", r"^pdf$"),
    # img2dataset's own, of its --min_image_size and --max_aspect_ratio.
    ("image too small", r"^image too small$"),
    ("aspect ratio", r"^aspect ratio too large$"),
    ("scheme not allowed", r"^(<urlopen error )?scheme not allowed|^HTTP Error 3.*not allowed"),
    ("redirect", r"^HTTP Error 3"),
    (DNS, r"Errno -(?!8\])\d+\]|nodename nor servname|name resolution|Name or service not known"),
    ("timeout", r"timed out|Errno 110\]"),
    ("tls", r"SSL|_ssl\.c|certificate|TLS"),
    ("incomplete", r"IncompleteRead"),
    (
        "connection",
        r"Errno (101|103|104|107|111|112|113|32|99)\]|Connection (refused|reset|aborted)"
        r"|Remote end closed|unreachable|Broken pipe|Got more than|got more than"
        r"|bad status line|^(<urlopen error )?(Tunnel connection failed|unexpected EOF)"
        r"|^HTTP/|chunk",
    ),
    ("missing file", r"Errno 2\]"),
    ("bad url", r"unknown url type|control characters|can't encode|nonnumeric port|IPv6 URL"),
    ("bad url", r"Errno -8\]|port must be 0-65535"),  # EAI_SERVICE, OverflowError of the socket
    ("bad url", r"no host given|label (empty|too long)|InvalidURL|invalid literal for int"),
    ("too many pixels", r"CV_IO_MAX_IMAGE|validateInputImageSize"),
    ("not an image", r"Image decoding error|^OpenCV\("),
)
_PATTERNS = [(group, re.compile(pattern)) for group, pattern in _GROUPS]
_HTTP = re.compile(r"HTTP Error (\d{3})")
_OWN_STATUS = (401, 403, 404, 410, 429)

FAILURES = tuple(
    dict.fromkeys(
        (*(g for g, _ in _GROUPS[1:]), *(f"http {s}" for s in (*_OWN_STATUS, "4xx", "5xx")), OTHER)
    )
)
# Groups that another try may turn into an image: what retry_failed.py takes by default.
TEMPORARY = ("connection", DNS, "http 429", "http 5xx", "incomplete", "timeout", "too slow")


def reason_group(message: str) -> str:
    """Stable group of a status message of img2dataset, e.g. `http 404`, `dns`, `not an image`.

    `message`: a key of `status_dict` in a `_stats.json`, or `error_message` of a parquet row.
    A text that no rule knows gives `other`.
    """
    status = _HTTP.match(message)
    if status and status[1][0] in "45":
        code = int(status[1])
        return f"http {code}" if code in _OWN_STATUS else f"http {code // 100}xx"
    return next((group for group, pattern in _PATTERNS if pattern.search(message)), OTHER)
