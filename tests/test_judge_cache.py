"""The judge's memory: what is known is not asked again, whoever found it and however they ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from judging import answer, openai_config, prompt
from stub_llm_server import StubServer

from megatron_ptrl.errors import InputError
from megatron_ptrl.rollout.judge_cache import JudgeCache, digest
from megatron_ptrl.rollout.rewards import make_rewarder

SECONDS = 60.0
WRITER = """
import sys
from pathlib import Path
from megatron_ptrl.rollout.judge_cache import JudgeCache, digest
cache, name = JudgeCache(Path(sys.argv[1])), sys.argv[2]
print("open", flush=True)
i = 0
while True:
    cache.add(digest(name, str(i)), i % 2)
    i += 1
    if i % 100 == 0:
        print(i, flush=True)
"""


def rewards(config, *predictions):
    rewarder = make_rewarder(config)
    futures = [rewarder.submit(prompt("right answers"), answer(said), truncated=False) for said in predictions]
    found, counts = [future.result(SECONDS).reward for future in futures], rewarder.counts()
    rewarder.close()
    return found, counts


def test_what_is_known_is_not_asked_again(tmp_path):
    with StubServer(tmp_path / "log", "--fault", "prose", "--every", "1000") as server:
        config = openai_config([server.url], cache=str(tmp_path / "deep" / "cache"))
        assert rewards(config, "right", "wrong", "poison")[0] == [1.0, 0.0, None]
        found, counts = rewards(config, "right", "wrong", "poison", "right answers")
        assert (found, counts["judge/cached"]) == ([1.0, 0.0, None, 1.0], 2)
        # Failures are not kept: they are asked for again, as often as the settings say.
        assert sorted(server.answered()) == ["poison"] * 4 + ["right"] * 2 + ["wrong"]


@pytest.mark.parametrize(
    "changed", [{"max_tokens": 20}, {"thinking": True}, {"reward": "strict"}, {"server": {"model": "another"}}]
)
def test_another_judge_knows_nothing(changed, tmp_path):
    with StubServer(tmp_path / "log") as server:
        for settings in ({}, changed):
            config = openai_config([server.url], cache=str(tmp_path / "cache"), **settings)
            rewards(config, "wrong")
        assert len(server.answered()) == 2


def test_a_judge_that_is_known_by_heart_need_not_be_up(tmp_path):
    with StubServer(tmp_path / "log") as server:
        config = openai_config([server.url], cache=str(tmp_path / "cache"), server={"model": "m"})
        assert rewards(config, "right")[0] == [1.0]
    assert rewards(config, "right")[0] == [1.0]


def test_processes_that_are_killed_while_they_write(tmp_path):
    path = tmp_path / "cache"
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in ("a", "b")]
    least = []
    for writer in writers:
        assert writer.stdout and writer.stdout.readline() == "open\n"
    while path.stat().st_size < 100_000:
        time.sleep(0.01)
    for writer in writers:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        least.append(int((["0"] + writer.stdout.read().split())[-1]))
        writer.stdout.close()
    with path.open("ab") as torn:
        torn.write(b"\n" + digest("torn", "0").encode()[:20])
    after = JudgeCache(path)
    after.add(digest("after", "0"), 1.0)
    after.close()
    cache = JudgeCache(path)
    for name, count in zip(("a", "b"), least, strict=True):
        assert [cache.get(digest(name, str(i))) for i in range(count)] == [float(i % 2) for i in range(count)]
    assert sum(least) > 500 and cache.get(digest("after", "0")) == 1.0 and cache.get(digest("torn", "0")) is None
    cache.close()


def test_processes_learn_from_each_other(tmp_path):
    one, other = JudgeCache(tmp_path / "cache"), JudgeCache(tmp_path / "cache")
    for i, (writer, reader) in enumerate([(one, other), (other, one)] * 3):
        assert reader.get(digest(str(i))) is None
        writer.add(digest(str(i)), i % 2)
        assert reader.get(digest(str(i))) == i % 2
    one.close()
    other.close()


def test_a_full_disk_only_turns_it_off(caplog):
    cache = JudgeCache(Path("/dev/full"))
    for i in range(3):
        cache.add(digest(str(i)), 1.0)
    assert [cache.get(digest(str(i))) for i in range(4)] == [1.0, 1.0, 1.0, None]
    (record,) = caplog.records
    assert "judge.cache /dev/full: No space left on device; judging goes on" in record.message


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(InputError, match="judge.cache .*expected a file to write to, or null"):
        JudgeCache(tmp_path)
    if os.getuid():
        (tmp_path / "cache").touch(mode=0o400)
        with pytest.raises(InputError, match="Permission denied"):
            JudgeCache(tmp_path / "cache")


def test_a_digest_tells_where_its_parts_end():
    assert len({digest("ab", "c"), digest("a", "bc"), digest("abc"), digest("ab", "c", "")}) == 4
