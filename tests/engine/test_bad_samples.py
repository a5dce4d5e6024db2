"""What could not be read is listed from all ranks, once a step, through kills."""

from engine.bad_samples import HEADER, BadSamples
from loaders.batch import BadSample
from tests import multiprocess


def two_lives(rank, world_size, folder):
    """Three windows on each rank, the second without bad samples; then a start after step 4."""
    bad, said = BadSamples(folder, 1.0), []
    bad.begin(0)
    bad.add(2, [BadSample("cc", "a.tar", f"k{rank}", "truncated")] * (rank + 1), 4)
    said.append(bad.write(3))
    bad.add(3, [], 4)
    said.append(bad.write(0))
    bad.add(5, [BadSample("cc", "a\tb.tar", "x\n\x1b[2J", "zero_bytes")] if rank else [], 4)
    said.append(bad.write(1))
    said.append(bad.totals())
    text = (folder / "bad_samples.tsv").read_text()
    multiprocess.dist.barrier()
    if rank == 0:
        with (folder / "bad_samples.tsv").open("a") as file:
            file.write("cc\ta.tar\tcut off")
    multiprocess.dist.barrier()
    again = BadSamples(folder, 1.0)
    again.begin(4)
    again.add(5, [BadSample("cc", "a.tar", "y", "zero_bytes")] if rank else [], 4)
    said.append(again.write(1))
    multiprocess.dist.barrier()
    return said, text, (folder / "bad_samples.tsv").read_text(), again.totals()


def test_bad_samples_of_all_ranks_are_listed_and_cut_when_a_run_is_continued(tmp_path):
    (said, text, after, totals), other = multiprocess.run(two_lives, 2, tmp_path)
    head = "\t".join(HEADER)
    first = ["cc\ta.tar\tk0\ttruncated\t2", *["cc\ta.tar\tk1\ttruncated\t2"] * 2]
    assert text.splitlines() == [head, *first, "cc\ta\\tb.tar\tx\\n\\x1b[2J\tzero_bytes\t5"]
    assert after.splitlines() == [head, *first, "cc\ta.tar\ty\tzero_bytes\t5"]
    path = tmp_path / "bad_samples.tsv"
    assert said == [
        "first bad sample: a.tar, sample 'k0' of cc in step 2: truncated; another took its place. "
        f"All are listed in {path}",
        None,
        None,
        f"4 bad samples: 3 truncated in cc, 1 zero_bytes in cc; listed in {path}",
        None,
    ]
    assert totals == f"4 bad samples: 3 truncated in cc, 1 zero_bytes in cc; listed in {path}"
    assert other[0] == [None] * 5, "rank 0 speaks"
