"""Two thousand damaged files: each is read, or refused in a sentence."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import harness
import targets


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return targets.Corpus(tmp_path_factory.mktemp("fuzz"))


def test_the_seeds_themselves_are_accepted(corpus):
    for seed in corpus.seeds:
        path = corpus.folder / ("shards/" + seed.name if seed.loader == "index" else seed.name)
        path.write_bytes(seed.data)
        assert corpus.run(seed, path)


@pytest.mark.slow
def test_damaged_files_are_read_or_refused_in_a_sentence(corpus):
    bad = []
    counts = harness.run(
        corpus, range(2000), on_bad=lambda *case: bad.append(case) if case[2] in ("raw", "hang") else None
    )
    assert not bad, "\n".join(f"case {number} ({name}): {what}\n{details}" for number, name, what, details in bad[:3])
    assert counts["refused"] > 1000 and counts["accepted"] > 50, counts  # the cases reach both ends
