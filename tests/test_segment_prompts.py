"""Segments -> prompts: who is a target, what a prompt shows, what the rewards compare with."""

import itertools

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ptrl.config import TaskConfig
from megatron_ptrl.errors import InputError
from megatron_ptrl.records import Prompt
from megatron_ptrl.segmenting.prompts import PromptMaker, fill, load_template

SEGMENTS = [
    "The farmer had three old sheep. ",
    "He sold one at the market. ",
    "Yes. ",
    "So two of them were left.\n",
    "They lived on the green hill. ",
    "The end came very soon.",
]


def make(segments=SEGMENTS, seed=0, **changed):
    places = [0, *itertools.accumulate(map(len, segments))]
    made = PromptMaker(TaskConfig(**changed)).make("doc", "".join(segments), places, seed, {"where": "a:1"})
    prompts = {task: [Prompt.from_json(line, "") for line in lines] for task, lines in made.lines.items()}
    assert made.prompts == {task: len(those) for task, those in prompts.items()}
    return [prompt for those in prompts.values() for prompt in those], made.skipped, made.segments


def test_the_papers_prompts():
    asr = load_template("asr", "default")
    assert asr.startswith(
        "Complete the text provided under ### Context by predicting the next most probable sentence.\n\n"
    )
    assert asr.endswith("<|startofprediction|> and <|endofprediction|> tags.\n\n### Context\n\n{context}")
    msr = load_template("msr", "default")
    assert msr.startswith(
        "## Text Material ##:\n{prompt}\n\n<MASK>\n{next_step}\n\n## Task ##:\nFill in the <MASK> section"
    )
    assert msr.endswith("for the <MASK> part within <|startofprediction|> and <|endofprediction|>.")


def test_a_worked_example():
    prompts, skipped, counts = make(reference_segments=3)
    assert not skipped and counts == {"segments": 6, "too_short": 1, "too_long": 0}
    asr = {p.metadata["segment"]: p for p in prompts if p.task == "asr"}
    msr = {p.metadata["segment"]: p for p in prompts if p.task == "msr"}
    # The third segment is too short for a target; the last one has none behind it to be shown.
    assert list(asr) == [2, 4, 5, 6] and list(msr) == [2, 4, 5]
    assert asr[2].id == "doc#2/asr" and msr[4].id == "doc#4/msr"
    assert asr[2].metadata == {"document": "doc", "segment": 2, "segments": 6, "where": "a:1"}
    assert asr[4].target == "So two of them were left."
    assert asr[4].reference == "So two of them were left.\nThey lived on the green hill. The end came very soon."
    assert asr[6].reference == asr[6].target == "The end came very soon."
    (message,) = asr[4].messages
    assert message["role"] == "user"
    shown = "The farmer had three old sheep. He sold one at the market. Yes."
    assert message["content"] == fill(load_template("asr", "default"), context=shown)
    # What is too short stands behind the mask: the reference of msr has it, and it is not what is shown.
    assert msr[2].reference == "He sold one at the market. Yes." and msr[2].target == "He sold one at the market."
    expected = fill(load_template("msr", "default"), prompt=SEGMENTS[0].strip(), next_step="So two of them were left.")
    assert msr[2].messages[0]["content"] == expected


def test_braces_of_a_text_are_text():
    prompts, _, _ = make(["Use {next_step} or {prompt} here. ", "Then {context} comes in. ", "It ends as it began. "])
    assert "Use {next_step} or {prompt} here." in prompts[-1].messages[0]["content"]


ODD = [
    'He said "No". ',
    "A\\b and a tab\t.",
    "\n\n",
    "Ünder 好 \u2028 \x7f it. ",
    " ",
    "\x00\x1f ends. ",
    "{context} {prompt}. ",
]


@given(
    pieces=st.lists(st.sampled_from(ODD), min_size=3, max_size=9), document=st.sampled_from(["a", 'q"\\', "é\ud800"])
)
def test_a_line_is_what_json_makes_of_the_prompt(pieces, document):
    """Texts are escaped once and put together; the places are any that cut no blank segment off."""
    text = "It begins here. " + "".join(pieces) + "And ends."
    places = [0, 16, *(i for i in range(20, len(text) - 9, 7) if text[i - 7 : i].strip()), len(text)]
    places = [place for i, place in enumerate(places) if not i or text[places[i - 1] : place].strip()]
    made = PromptMaker(TaskConfig(min_words=1)).make(document, text, places, 0, {"where": 'x"y:1', "n": 1})
    lines = [line for those in made.lines.values() for line in those]
    assert lines
    for line in lines:
        prompt = Prompt.from_json(line, "")
        i, last = prompt.metadata["segment"] - 1, len(places) - 2
        assert prompt.target == text[places[i] : places[i + 1]].strip() and prompt.metadata["document"] == document
        assert prompt.to_line() + b"\n" == line or "\ud800" in document
        shown = text[: places[i]].strip()
        if prompt.task == "asr":
            assert prompt.reference == text[places[i] : places[min(i + 4, last + 1)]].strip()
            assert prompt.messages[0]["content"] == fill(load_template("asr", "default"), context=shown)
        else:
            assert shown in prompt.messages[0]["content"]


def test_a_context_loses_its_beginning():
    # 4 bytes a token: the six segments end at tokens 8, 15, 16, 23, 30 and 36.
    prompts, skipped, _ = make(context_tokens=8, tasks=["asr"])
    contexts = [p.messages[0]["content"].rpartition("### Context\n\n")[2] for p in prompts]
    assert contexts == [
        "The farmer had three old sheep.",
        "He sold one at the market. Yes.",
        "Yes. So two of them were left.",
        "They lived on the green hill.",
    ]
    prompts, skipped, _ = make(context_tokens=7, tasks=["asr"])
    assert [p.metadata["segment"] for p in prompts] == [4, 5, 6]
    assert [(s.reason, s.task) for s in skipped] == [("context_too_long", "asr")] and "segment 2" in skipped[0].detail
    prompts, skipped, _ = make(context_tokens=14, tasks=["msr"])
    assert [p.metadata["segment"] for p in prompts] == [4, 5] and [s.reason for s in skipped] == ["context_too_long"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["the old sheep and the market and the hill"] * 9, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


@settings(max_examples=40)
@given(
    segments=st.lists(st.sampled_from([*SEGMENTS, "好 the 好. ", "I. ", "the " * 30 + ". "]), min_size=2, max_size=9),
    limit=st.integers(5, 90),
    task=st.sampled_from(["asr", "msr"]),
)
def test_a_context_is_as_long_as_it_may_be(tokenizer, segments, limit, task):
    vocabulary = tokenizers.Tokenizer.from_file(str(tokenizer))
    prompts, skipped, _ = make(segments, context_tokens=limit, tokenizer=str(tokenizer), tasks=[task])
    for prompt in prompts:
        content, i = prompt.messages[0]["content"], prompt.metadata["segment"] - 1
        if task == "asr":
            context, shown = content.rpartition("### Context\n\n")[2], ""
        else:
            context, _, shown = (
                content.partition("## Task")[0].removeprefix("## Text Material ##:\n").partition("<MASK>")
            )
        before = "".join(segments[:i]).strip()
        assert before.endswith(context.strip()) and context.strip()
        # The white space at the edges is counted but not shown.
        sizes = [len(vocabulary.encode(text.strip()).ids) for text in (context, shown)]
        assert sum(sizes) <= limit
        left = before[: len(before) - len(context.strip())]
        if left:
            j = next(j for j in range(i) if "".join(segments[j:i]).strip() == context.strip())
            whole = "".join(segments[j - 1 : i]).strip()
            assert len(vocabulary.encode(whole).ids) + sizes[1] > limit - 2


def test_so_many_targets_of_a_document():
    text = [f"This is sentence number {i} of it. " for i in range(40)]
    every = [p.metadata["segment"] for p in make(text, tasks=["asr"])[0]]
    assert every == list(range(2, 41))
    drawn = [[p.metadata["segment"] for p in make(text, seed=s, targets_per_document=5)[0]] for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 10
    assert drawn[0][:5] == sorted(drawn[0][:5]) and drawn[0][:5] != drawn[0][5:]


@pytest.mark.parametrize(
    "segments, expected",
    [
        (SEGMENTS[:1], [("asr", "too_few_segments"), ("msr", "too_few_segments")]),
        (SEGMENTS[:2], [("msr", "too_few_segments")]),
        ([], [("asr", "too_few_segments"), ("msr", "too_few_segments")]),
        ([SEGMENTS[0], "Yes. ", "No. "], [("asr", "no_target"), ("msr", "no_target")]),
        ([SEGMENTS[0], SEGMENTS[1], "No. "], [("msr", "no_target")]),
        ([SEGMENTS[0], "word " * 201, SEGMENTS[1]], [("msr", "no_target")]),
    ],
)
def test_what_gives_no_prompt(segments, expected):
    prompts, skipped, _ = make(segments)
    assert [(s.task, s.reason) for s in skipped] == expected
    assert {p.task for p in prompts} == {"asr", "msr"} - {task for task, _ in expected}


def test_a_prompt_of_ones_own_is_text(tmp_path):
    own = tmp_path / "own.txt"
    own.write_text('100 % "sure" {target}, %b:\n{context}\nOnce more, %(context)b: {context}')
    prompts, _, _ = make(asr_prompt=str(own), tasks=["asr"])
    expected = fill(own.read_text(), context=SEGMENTS[0].strip())
    assert prompts[0].messages[0]["content"] == expected and prompts[0].target == SEGMENTS[1].strip()


def test_bad_settings(tmp_path):
    (tmp_path / "no_hole.txt").write_text("Go on: {context}")
    with pytest.raises(
        InputError, match=r"msr prompt .*no_hole.txt has no \{prompt\}; expected \{prompt\}, \{next_step\}"
    ):
        PromptMaker(TaskConfig(msr_prompt=str(tmp_path / "no_hole.txt")))
    with pytest.raises(InputError, match="asr prompt none.txt"):
        PromptMaker(TaskConfig(asr_prompt="none.txt"))
    with pytest.raises(InputError, match="expected a Hugging Face tokenizer.json"):
        PromptMaker(TaskConfig(tokenizer=str(tmp_path / "no_hole.txt")))
    for changed in ({"tasks": []}, {"tasks": ["asr", "asr"]}, {"min_words": 9, "max_words": 8}, {"context_tokens": 0}):
        with pytest.raises(InputError, match="task."):
            TaskConfig(**changed)
