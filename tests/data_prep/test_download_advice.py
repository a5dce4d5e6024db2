"""Advice about failed downloads rests on enough rows and hosts of a list that nobody selected."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.checks.report_collect import collect, open_source
from data_prep.download.advice import Hosts, resolver_advice
from data_prep.report import markdown
from tests.data_prep.test_report import DNS, GONE, SLOW, begin, download


@pytest.mark.parametrize(
    ("rows", "failed", "hosts", "advice"),
    [
        (1000, 50, 1000, False),  # five percent
        (1000, 51, 1000, True),
        (999, 500, 999, False),  # too few rows
        (1000, 500, 99, False),  # too few hosts
        (1000, 500, 1000, True),
    ],
)
def test_many_unresolved_hosts_bring_the_advice(tmp_path, rows, failed, hosts, advice):
    out = tmp_path / "D"
    begin(out, size=rows, attempted=rows)
    said = [None if n == failed else DNS if n < failed else GONE for n in range(rows)]
    download(out, 0, [(n, "x", error, str(n)) for n, error in enumerate(said)])
    table = pq.read_table(out / "shards" / "00000.parquet")
    urls = [f"http://host{n % hosts}.example/{n}" for n in range(rows)]
    table = table.set_column(table.column_names.index("url"), "url", pa.array(urls))
    pq.write_table(table, out / "shards" / "00000.parquet")
    facts = collect(open_source(out))
    assert facts["dns_share"] == failed / rows
    assert facts["hosts"] == {"asked": hosts, "unresolved": min(failed, hosts)}
    facts |= {"table_1": dict.fromkeys(("images", "concepts", "vocabulary", "images_per_concept"))}
    text = markdown([facts])
    assert ("Run a local one (unbound or knot-resolver)" in text) == advice
    assert (f"retry_failed.py {out} --reasons dns" in text) == advice
    share = f"{failed / rows:.1%} of the {rows} rows of the list that were tried ({failed} of their"
    assert (share in text) == advice


def test_one_dead_host_is_not_the_resolver(tmp_path):
    out = tmp_path / "D"
    hosts = Hosts()
    urls = ["http://dead.example/1"] * 400 + [f"http://host{n}.example/1" for n in range(600)]
    columns = {
        "url": urls,
        "status": ["failed"] * 1000,
        "error_message": [DNS] * 400 + [GONE] * 600,
    }
    hosts.add(pa.table(columns))
    assert (len(hosts.asked), hosts.unresolved) == (601, {"dead.example"})
    assert resolver_advice(out, 1000, 400, hosts) is None


def test_the_leading_reason_brings_one_advice(tmp_path):
    out = tmp_path / "D"
    begin(out, size=5, attempted=5)
    errors = ["private address"] * 3 + [SLOW, None]
    download(out, 0, [(n, "x", error, str(n)) for n, error in enumerate(errors)])
    advice = collect(open_source(out))["advice"]
    assert advice.startswith("3 addresses are loopback, private or link-local ones")
    assert advice.endswith(f"{out} --reasons 'private address' --allow-private-addresses")
