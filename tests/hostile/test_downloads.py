"""Where a download may lead: several redirects, and addresses that stand for others.

Single redirects, `file:` and name look-ups: tests/data_prep/test_img2ds.py, test_img2ds_child.py.
"""

import pytest

from data_prep.download.img2ds_child import is_public
from data_prep.download.reasons import reason_group
from tests.data_prep import downloads

# A chain of public redirects that ends inside, at a file, at another name of loopback.
_NAMESPACE = """
import sys
from tests.data_prep.downloads import command, rows, run
from tests.data_prep import http_server
from tests.data_prep.http_server import Handler, serve
from pathlib import Path
home = Path(sys.argv[1])
ENDS = {
    "inside": "http://10.1.2.3:{port}/jpeg/7.jpg", "loopback": "http://127.0.0.1:{port}/jpeg/7.jpg",
    "decimal": "http://2130706433:{port}/jpeg/7.jpg", "octal": "http://0177.0.0.1:{port}/jpeg/7.jpg",
    "short": "http://127.1:{port}/jpeg/7.jpg", "zero": "http://0:{port}/jpeg/7.jpg",
    "name": "http://localhost:{port}/jpeg/7.jpg",
    "mapped": "http://[::ffff:127.0.0.1]:{port}/jpeg/7.jpg",
    "metadata": "http://169.254.169.254/jpeg/7.jpg",
    "user": "http://public@127.0.0.1:{port}/jpeg/7.jpg",
    "file": "file:///etc/hostname", "gopher": "gopher://127.0.0.1:{port}/7",
    "data": "data:image/png,x",
    "good": "http://93.184.215.14:{port}/jpeg/7.jpg",
}
def chain(self):
    _, _, left, end = self.path.split("/")
    target = ENDS[end.removesuffix(".jpg")].format(port=self.server.port)
    self.redirect(target if left == "1" else f"/chain/{int(left) - 1}/{end}")
Handler.trouble_chain = chain
with serve("0.0.0.0") as server:
    start = f"http://93.184.215.14:{server.port}/chain/3/"
    (home / "l.tsv").write_text("".join(f"{end}\\t{start}{end}.jpg\\n" for end in ENDS))
    arguments = command(home / "l.tsv", home / "D", processes=1)
    arguments.remove("--allow-private-addresses")
    done = run(arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert server.requests["/jpeg/7.jpg"] == 1, server.requests
    for end in ENDS:
        assert server.requests[f"/chain/1/{end}.jpg"], "the chain was not followed to its end"
for row in sorted(rows(home / "D"), key=lambda row: row["row"]):
    print(list(ENDS)[row["row"]], row["error_message"] or row["status"], sep="\\t")
"""


def test_a_chain_of_public_redirects_does_not_lead_inside(tmp_path):
    """In a network of its own: all addresses are one server, which would gladly answer."""
    addresses = ("93.184.215.14", "10.1.2.3", "169.254.169.254")
    groups = {}
    for line in downloads.run_in_own_network(_NAMESPACE, addresses, tmp_path):
        end, _, message = line.partition("\t")
        groups[end] = reason_group(message)
    assert groups.pop("good") == "success"
    for end in ("file", "gopher", "data"):
        assert groups.pop(end) == "scheme not allowed"
    assert groups.pop("user") == "credentials in url"
    assert set(groups.values()) == {"private address"}, groups


@pytest.mark.parametrize(
    "address",
    ["::127.0.0.1", "::10.0.0.1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1",
     "2002:7f00:1::", "2002:a00:1::1", "::1", "::", "fe80::1", "fc00::1"],
)  # fmt: skip
def test_ipv6_addresses_that_stand_for_private_ones(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["64:ff9b::808:808", "2002:808:808::1", "2606:4700::1111"])
def test_ipv6_addresses_that_stand_for_public_ones(address):
    assert is_public(address)
