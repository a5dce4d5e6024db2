"""What to do about failed downloads: one advice, drawn from rows that nobody selected."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.download.reasons import DNS, PRIVATE, SUCCESS, TEMPORARY, reason_group

# From this share on, of the rows and of the hosts, the resolver is to blame rather than dead sites
# (img2dataset's README: public resolvers limit the questions of one asker).
DNS_SHARE = 0.05
# Fewer tell nothing: at 1000 rows the standard error of a share of 5 % is 0.7 %, and a few dead
# sites are many rows of one host.
MIN_ROWS, MIN_HOSTS = 1000, 100
_HOST = r"^[A-Za-z][A-Za-z0-9+.\-]*://(?:[^/?#@]*@)?(?P<host>[^/?#:]*)"
COLUMNS = ("url", "status", "error_message")


class Hosts:
    """Distinct hosts of the rows that were tried, and those whose name was not resolved once."""

    def __init__(self) -> None:
        self.asked: set[str] = set()
        self.unresolved: set[str] = set()

    def add(self, table: pa.Table | None) -> None:
        """The rows of one shard (`COLUMNS`); without addresses they count for nothing."""
        if table is None or not set(COLUMNS).issubset(table.column_names):
            return
        found = pc.extract_regex(table["url"], pattern=_HOST)
        hosts = pc.struct_field(pa.chunked_array(found), "host").combine_chunks()
        self.asked.update(hosts.unique().drop_null().to_pylist())
        messages = pc.fill_null(table["error_message"], "").combine_chunks().dictionary_encode()
        names = [reason_group(text) == DNS for text in messages.dictionary.to_pylist()]
        failed = np.array(names, bool)[messages.indices.to_numpy()]
        failed &= ~pc.equal(table["status"], SUCCESS).to_numpy()
        self.unresolved.update(hosts.filter(pa.array(failed)).unique().drop_null().to_pylist())


def resolver_advice(out: Path, rows: int, failed: int, hosts: Hosts) -> str | None:
    """Advice if so many of the `rows` of a whole list, and of their hosts, failed by name
    resolution (`failed`) that the resolver is to blame; else None."""
    asked, unresolved = len(hosts.asked), len(hosts.unresolved)
    if rows < MIN_ROWS or asked < MIN_HOSTS:
        return None
    if failed <= DNS_SHARE * rows or unresolved <= DNS_SHARE * asked:
        return None
    return (
        f"the host name could not be resolved for {failed / rows:.1%} of the {rows} rows of the "
        f"list that were tried ({unresolved} of their {asked} hosts). That many point to the "
        "resolver, not to dead sites: public ones limit many questions a second. Run a local one "
        f"(unbound or knot-resolver), then: python data_prep/retry_failed.py {out} --reasons {DNS}"
    )


def leading_advice(out: Path, reasons: Mapping[str, int]) -> str | None:
    """Advice by the most frequent reason (rows by reason group, without successes), else the
    command that tries again what may succeed; None if nothing may."""
    if not reasons:
        return None
    top, count = Counter(reasons).most_common(1)[0]
    retry = f"python data_prep/retry_failed.py {out}"
    if top == PRIVATE:
        return (
            f"{count} addresses are loopback, private or link-local ones, which a public list has "
            f"no reason to name. If they are a mirror of your own: {retry} --reasons '{PRIVATE}' "
            "--allow-private-addresses"
        )
    return f"retry: {retry}" if set(reasons).intersection(TEMPORARY) else None
