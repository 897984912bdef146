"""What is left out before segmenting, and what is masked."""

import itertools
import json
import random

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stub_llm_server import StubServer

from megatron_ptrl.config import CleanConfig, QualityConfig, ServerConfig
from megatron_ptrl.errors import InputError
from megatron_ptrl.segmenting.decontaminate import index_runs, shared_run
from megatron_ptrl.segmenting.mask import EMAIL, IP, mask
from megatron_ptrl.segmenting.near_duplicates import _A, _B, find_duplicates, signatures
from megatron_ptrl.segmenting.quality import score_of, score_part
from megatron_ptrl.segmenting.rules import REASONS, broken_rule
from megatron_ptrl.segmenting.words import WordHashes, count_words, run_hashes, words_of

VOCABULARY = [f"w{i}" for i in range(2000)]


def jaccard(one, other):
    runs = [set(zip(*(text[k:] for k in range(5)), strict=False)) for text in (one, other)]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def test_words():
    assert words_of("It's 3.5 km_h; ÉTÉ 中文abc") == ["it", "s", "3", "5", "km", "h", "été", "中", "文", "abc"]
    hashes = WordHashes()(["a", "b", "a"])
    assert hashes[0] == hashes[2] != hashes[1] and (hashes == WordHashes()(["a", "b", "a"])).all()


@given(
    st.lists(st.sampled_from(["Ab", "9", "_", " ", "\n", "'", "é", "中", "\x1c", "²", "-x"])).map("".join), st.data()
)
def test_words_are_counted_between_places(text, data):
    # A place inside of a word makes two of it.
    places = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    assert count_words(text, places) == [len(words_of(text[a:b])) for a, b in itertools.pairwise(places)]
    assert words_of(text) == words_of(text + " é")[:-1]  # however ASCII is done


@given(st.lists(st.sampled_from("abc"), max_size=12), st.integers(1, 5))
def test_runs_are_equal_where_their_words_are(words, length):
    found = run_hashes(WordHashes()(words), length).tolist()
    runs = [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]
    assert len(found) == len(runs)
    assert [[a == b for a in found] for b in found] == [[a == b for a in runs] for b in runs]


def test_near_duplicates_are_found_as_often_as_they_should():
    draw, hashes = random.Random(0), WordHashes()
    for share, low, high in ((0.01, 0.9, 1.0), (0.05, 0.1, 0.6), (0.3, 0.0, 0.03)):
        found, likeness, expected = 0, [], 0.0
        for _ in range(100):
            text = draw.choices(VOCABULARY, k=300)
            other = [draw.choice(VOCABULARY) if draw.random() < share else word for word in text]
            likeness.append(jaccard(text, other))
            expected += 1 - (1 - likeness[-1] ** 8) ** 14
            rows = signatures([((0, 1), hashes(text)), ((0, 2), hashes(other))])
            found += len(find_duplicates([rows]))
        print(f"Jaccard {sum(likeness) / 100:.2f}: found {found} of 100, expected {expected:.1f}")
        assert abs(found - expected) <= 12 and 100 * low <= found <= 100 * high


def test_the_first_of_a_cluster_stays():
    draw, hashes = random.Random(1), WordHashes()
    texts = [draw.choices(VOCABULARY, k=60) for _ in range(4)]
    order = [0, 1, 0, 2, 1, 0, 3, 3]
    documents = [((0, line), hashes(texts[i])) for line, i in enumerate(order, start=1)]
    documents.insert(3, ((0, 99), hashes(["too", "short"])))
    whole = find_duplicates([signatures(documents)])
    assert [(row["line"], row["of_line"]) for row in whole] == [(3, 1), (5, 2), (6, 1), (8, 7)]
    halves = find_duplicates([signatures(documents[:4]), signatures([]), signatures(documents[4:])])
    assert [(row["part"], row["line"], row["of_part"], row["of_line"]) for row in halves] == [
        (0, 3, 0, 1),
        (2, 5, 0, 2),
        (2, 6, 0, 1),
        (2, 8, 2, 7),
    ]
    assert len(find_duplicates([])) == 0


def test_a_signature_is_that_of_the_document_alone(monkeypatch):
    """By the definition: the least of each order over the set of 5-word runs, eight of them in a key."""
    draw, hashes = random.Random(2), WordHashes()
    texts = [draw.choices(VOCABULARY, k=size) for size in (5, 300, 4, 7, 0, 2000, 6)]
    monkeypatch.setattr("megatron_ptrl.segmenting.near_duplicates._WORDS_AT_ONCE", 400)
    rows = signatures(((0, line), hashes(text)) for line, text in enumerate(texts))
    assert rows["line"].tolist() == [0, 1, 3, 5, 6]
    for row in rows:
        runs = set(run_hashes(hashes(texts[row["line"]]), 5).tolist())
        least = [min((int(a) * run + int(b)) % 2**64 for run in runs) for a, b in zip(_A, _B, strict=True)]
        bands = numpy.array(least, numpy.uint64).reshape(14, 8)
        assert row["keys"].tolist() == [int(run_hashes(band, 8)[0]) for band in bands]


def test_decontamination(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"question": "How many legs has a spider?", "choices": ["Six of them", {"x": "eight of them, all"}]})
        + "\n\n"
        + json.dumps(["one two three four five six"])
    )
    (tmp_path / "b.txt").write_text("A text of exactly eight words is here.")
    index, texts, short = index_runs([str(tmp_path)], 5)
    assert texts == 5 and short == 2 and len(index) == len(numpy.unique(index)) == 2 + 2 + 4
    hashes = WordHashes()

    def found(text):
        words = words_of(text)
        return shared_run(words, hashes(words), index, 5)

    assert found("I ask: how many LEGS has -- a spider, please?") == "how many legs has a"
    assert found("zero two three four five six seven") == "two three four five six"
    assert found("how many legs had a spider") is None and found("two three four five") is None and found("") is None
    assert index_runs([], 5)[1:] == (0, 0)
    (tmp_path / "c.jsonl").write_text('{"a": 1}\n{broken')
    with pytest.raises(InputError, match="c.jsonl:2: .*expected a line of JSON"):
        index_runs([str(tmp_path / "c.jsonl")], 5)


GOOD = "It is known that the people of the town have to go with the king and be happy. " * 5
BROKEN = {
    "too_few_words": "one two",
    "too_many_words": GOOD * 300,
    "short_words": "a b of " * 40,
    "long_words": "characteristically unquestionable " * 30,
    "hash_signs": GOOD + "#" * 20,
    "ellipses": GOOD.replace("the", "the..."),
    "bullets": GOOD.replace("It", "\n- It"),
    "lines_ending_in_ellipsis": GOOD.replace("happy.", "happy...\n"),
    "few_alphabetic_words": GOOD + "12345 " * 60,
    "few_stop_words": "Diese Leute gehen heute gemeinsam nach Hause und freuen sich. " * 8,
}


def test_rules():
    config = CleanConfig(max_words=10_000)
    assert broken_rule(GOOD, config) is None and set(BROKEN) == set(REASONS)
    assert {name: broken_rule(text, config) for name, text in BROKEN.items()} == {name: name for name in BROKEN}
    assert broken_rule(BROKEN["few_stop_words"], CleanConfig(min_stop_words=0)) is None
    assert broken_rule("", CleanConfig(min_words=0)) == "too_few_words"


def test_masks():
    text = "Write to jane.doe+x@mail.example.co.uk or to <a@b.de>, from 8.8.8.8 or 192.168.0.1, @home and 1@."
    assert mask(text) == f"Write to {EMAIL} or to <{EMAIL}>, from {IP} or 192.168.0.1, @home and 1@."
    assert mask(text) * 2 == mask(text * 2)


PIECES = ["x" * 300, " ", "a@b.de", "@", "first.last@mail.org", "y" * 20, ".", "8.8.", "8.8", "255", "8.8.255.9", "9"]


@given(st.lists(st.sampled_from(PIECES), max_size=12))
def test_masks_near_the_signs_are_those_of_the_whole_text(pieces):
    from datatrove.pipeline.formatters.pii import PIIFormatter

    text = "".join(pieces)
    whole = PIIFormatter(email_replacement=EMAIL, ip_replacement=IP)
    # RFC 5321 has no local part of more than 64 characters; of a longer one the expression takes all, and we the end.
    expected = whole.format(text)
    if not any(len(word) > 300 for word in text.split()):
        assert mask(text) == expected
    assert ("a@b.de" in mask(text)) == ("a@b.de" in expected)


def test_a_score_is_the_last_line():
    assert score_of("Fine.\nScore: 4") == 4 and score_of("Score: 1, no:\n**Score: 3.5**") == 3.5
    assert score_of("Score: 7") is None and score_of("Good") is None and score_of("Score: 10") is None


def test_scores_are_asked_for_once(tmp_path):
    documents = [((0, i + 1), "x" * i + " is the first word") for i in range(1, 30)]
    prompt, log, path = tmp_path / "prompt.txt", tmp_path / "log", tmp_path / "scores" / "0.jsonl"
    prompt.write_text("{context}")
    with StubServer(log, "--fault", "score", "--every", "1") as server:
        server_config = ServerConfig(model="m", in_flight=4)
        config = QualityConfig(servers=[server.url], server=server_config, prompt=str(prompt))
        scores = score_part(iter(documents[:20]), config, None, path)
        path.write_bytes(path.read_bytes()[:-3])
        scores = score_part(iter(documents), config, None, path)
        assert score_part(iter(documents), config, None, path) == scores
        assert len(server.answered()) == len(documents) + 1
    assert [scores[0, i + 1].score for i in range(1, 30)] == [i % 6 for i in range(1, 30)]
    with StubServer(log) as server:
        config = QualityConfig(servers=[server.url], server=server_config, prompt=str(prompt))
        (score,) = score_part(iter(documents[:1]), config, None, tmp_path / "1.jsonl").values()
        assert score.score is None and score.detail == "no score from 0 to 5 in ''"
