"""Conversations as tokens: the mask is of the responses, and what stands before one is what a model is asked with."""

import json
from pathlib import Path

import numpy
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ptrl.data.chat import (
    ChatTemplate,
    Message,
    PlainTemplate,
    encode_chat,
    encode_prompt,
    make_template,
)
from megatron_ptrl.data.chat_store import Conversations, build_conversations
from megatron_ptrl.data.tokenizer import DEFAULT_EOD, Tokenizer
from megatron_ptrl.errors import InputError

CHATML = """{%- for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content | trim }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TALK: list[Message] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hello hello"},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "be brief"},
]


def byte_pairs(path: Path, *special: str) -> Tokenizer:
    """Merges with no regard for words, so that any two neighbours may become one token."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.decoder = tokenizers.decoders.Fuse()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=[*special], show_progress=False)
    texts = [PlainTemplate().render(TALK, ask=True), "".join(map(chr, range(32, 127))), "\n \n\t"] * 3
    # The strongest of all: a line break before the first letter of an answer.
    texts += ["\nh"] * 99
    bpe.train_from_iterator(texts, trainer)
    bpe.save(str(path))
    return Tokenizer(path, special[0])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_pairs(tmp_path_factory.mktemp("plain") / "tokenizer.json", DEFAULT_EOD)


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("chatml") / "tokenizer.json"
    return byte_pairs(path, "<|im_end|>", "<|im_start|>", "<s>", DEFAULT_EOD)


def jinja(folder: Path, source: str, tokenizer: Tokenizer) -> ChatTemplate:
    (folder / "chat.jinja").write_text(source)
    return make_template(str(folder / "chat.jinja"), tokenizer)


def responses_of(ids: numpy.ndarray, is_response: numpy.ndarray, eod: int) -> list[tuple[int, list[int]]]:
    """(where it begins, its ids without the end) of each response."""
    found, begin = [], None
    for place, (token, inside) in enumerate(zip(ids.tolist(), is_response.tolist(), strict=True)):
        if inside and begin is None:
            begin = place
        if inside and token == eod:
            found.append((begin, ids[begin:place].tolist()))
            begin = None
    assert begin is None, "a response without its end"
    return found


contents = st.text(st.sampled_from("ab <|>\n\tuser"), min_size=1, max_size=12).filter(str.strip)
talks = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": contents}),
    min_size=1,
    max_size=6,
).filter(lambda talk: any(message["role"] == "assistant" for message in talk))


@settings(max_examples=150)
@given(talk=talks)
def test_every_response_stands_where_the_model_is_asked_for_it(tokenizer, talk):
    ids, is_response = encode_chat(PlainTemplate(), tokenizer, talk)
    turns = [turn for turn, message in enumerate(talk) if message["role"] == "assistant"]
    found = responses_of(ids, is_response, tokenizer.eod)
    assert len(found) == len(turns) and is_response[-1] and ids[-1] == tokenizer.eod
    for turn, (begin, response) in zip(turns, found, strict=True):
        assert encode_prompt(PlainTemplate(), tokenizer, talk[:turn]).tolist() == ids[:begin].tolist()
        assert tokenizer.decode(response) == talk[turn]["content"].rstrip()
        # What a sampler writes to that question, and no other cut of it, is what was trained on.
        assert response == tokenizer.encode(talk[turn]["content"].rstrip())


def test_no_token_reaches_over_the_edge_of_a_response(tokenizer):
    whole = PlainTemplate().render(TALK[:3], ask=False)
    edge = len(PlainTemplate().render(TALK[:2], ask=True))
    at_once = tokenizer.encode(whole)
    assert edge not in [len(tokenizer.decode(at_once[:n])) for n in range(len(at_once))], "it merges over the edge"
    ids, is_response = encode_chat(PlainTemplate(), tokenizer, TALK[:3])
    question = ids[: is_response.argmax()].tolist()
    assert tokenizer.decode(question) == whole[:edge] and question == tokenizer.encode(whole[:edge])


def test_a_prompt_without_earlier_responses_is_its_rendered_text(tokenizer):
    expected = tokenizer.encode(PlainTemplate().render(TALK[:2], ask=True))
    assert encode_prompt(PlainTemplate(), tokenizer, TALK[:2]).tolist() == expected


@pytest.mark.parametrize("marked", [False, True])
def test_a_chat_template_ends_responses_with_its_own_token(tmp_path, chatml, marked):
    source = CHATML.replace(
        "{{ message.content | trim }}", "{% generation %}{{ message.content | trim }}{% endgeneration %}"
    )
    template = jinja(tmp_path, source if marked else CHATML, chatml)
    # Two blanks before the word belong to no turn that this template writes.
    talk = [*TALK[:3], {"role": "user", "content": " again \n"}, TALK[4]]
    ids, is_response = encode_chat(template, chatml, talk)
    turns = [f"<|im_start|>{message['role']}\n{message['content'].strip()}<|im_end|>\n" for message in TALK]
    names = {"<|im_end|>": chatml.eod, "<|im_start|>": 1}
    expected: list[int] = []
    for message in TALK:
        expected += [names["<|im_start|>"]]
        expected += chatml.encode(
            message["role"] + "\n" + ("" if message["role"] == "assistant" else message["content"])
        )
        expected += chatml.encode(message["content"]) if message["role"] == "assistant" else []
        expected += [names["<|im_end|>"], *chatml.encode("\n")]
    assert chatml.decode(ids) == "".join(turns).removesuffix("\n")
    assert ids.tolist() == expected[: -len(chatml.encode("\n"))]
    texts = [chatml.decode(response) for _, response in responses_of(ids, is_response, chatml.eod)]
    assert texts == ["hello hello", "be brief"]
    begin = responses_of(ids, is_response, chatml.eod)[1][0]
    assert encode_prompt(template, chatml, talk[:4]).tolist() == ids[:begin].tolist()


@pytest.mark.parametrize("path", ["chat.jinja", "tokenizer_config.json"])
def test_a_prompt_is_tokenized_as_transformers_does(tmp_path, chatml, path):
    """Trimmed blocks, `break`, `tojson` as Hugging Face has it, special tokens, the generation prompt."""
    from transformers import PreTrainedTokenizerFast

    source = "{{ bos_token }}" + CHATML.replace(
        "{{ message.content | trim }}",
        "{% if message.content == 'stop' %}{% break %}{% endif %}{{ message.content | tojson }}",
    )
    named = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": source, **named}))
    (tmp_path / "chat.jinja").write_text(source)
    talk = [*TALK[:1], {"role": "user", "content": 'a "<b>" & \u00e9'}]
    theirs = PreTrainedTokenizerFast(tokenizer_file=chatml.path, **named)
    options = {"chat_template": source, "add_generation_prompt": True}
    template = make_template(str(tmp_path / path), chatml)
    assert template.render(talk, ask=True) == theirs.apply_chat_template(talk, tokenize=False, **options)
    expected = theirs.apply_chat_template(talk, tokenize=True, return_dict=False, **options)
    assert encode_prompt(template, chatml, talk).tolist() == expected


def test_a_template_without_special_tokens_gets_the_end_of_a_document(tmp_path, chatml):
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    source += "{% if add_generation_prompt %}assistant: {% endif %}"
    ids, is_response = encode_chat(jinja(tmp_path, source, chatml), chatml, TALK)
    assert chatml.decode(ids[is_response]) == "hello hello<|im_end|>be brief<|im_end|>"
    assert chatml.decode(ids[~is_response]).endswith("assistant: \n\nuser: again\n\nassistant: ")


def test_a_tokenizer_config_brings_its_template_and_special_tokens(tmp_path, chatml):
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "<|im_end|>", "pad_token": None}
    config["chat_template"] = [
        {"name": "tools", "template": "x"},
        {"name": "default", "template": "{{bos_token}}" + CHATML},
    ]
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(config))
    template = make_template(str(path), chatml)
    ids = encode_prompt(template, chatml, TALK[:2])
    assert ids[0] == 2 and chatml.decode(ids).startswith("<s><|im_start|>system\nbe brief<|im_end|>\n")
    (tmp_path / "chat_template.jinja").write_text("{{bos_token}}{{eos_token}}" + CHATML)
    beside = make_template(str(tmp_path / "chat_template.jinja"), chatml)
    assert (
        beside.render([], ask=True) == "<s><|im_end|><|im_start|>assistant\n" and beside.identity != template.identity
    )


REFUSED = {
    "a message spells the special token <|im_start|>": (CHATML, "<|im_start|>system"),
    "ends a response with <s> and the end-of-document token is <|im_end|>": (CHATML.replace("<|im_end|>", "<s>"), "x"),
    "refuses the conversation: no users here": ("{{ raise_exception('no users here') }}", "x"),
    "refuses the conversation: access to attribute '__class__'": ("{{ ''.__class__.__mro__ }}", "x"),
    "refuses the conversation: 'strftime_now' is undefined": ("{{ strftime_now('%d') }}" + CHATML, "x"),
    "leaves a response out": (CHATML.replace("{{ message.content | trim }}", ""), "x"),
    # As templates that drop the thinking of all turns but the last one.
    "rewrites what stood there": (
        CHATML.replace("{{ message.content | trim }}", "{{ '' if loop.last else 'old ' }}{{ message.content }}"),
        "x",
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_learnt_exactly_is_refused(tmp_path, chatml, reason):
    source, content = REFUSED[reason]
    with pytest.raises(InputError) as caught:
        encode_chat(jinja(tmp_path, source, chatml), chatml, [{"role": "user", "content": content}, *TALK[2:]])
    assert reason in str(caught.value)


# As Qwen3's: thinking stays in the turns behind the last question alone.
FORGETS = """{%- set ns = namespace(last=-1) %}
{%- for message in messages if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endfor %}
{%- set seen = namespace(users=-1) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{% set seen.users = seen.users + 1 %}{% endif %}
<|im_start|>{{ message.role }}
{{ message.content if seen.users == ns.last else message.content.split('</think>')[-1] }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
THOUGHTFUL: list[Message] = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "<think>hm</think>hello hello"},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "<think>well</think>be brief"},
]


def test_a_template_that_forgets_thinking_trains_each_turn_as_it_is_asked_for(tmp_path, chatml):
    template = jinja(tmp_path, FORGETS, chatml)
    with pytest.raises(InputError, match="rewrites what stood there .*; data.turns apart trains on each response"):
        encode_chat(template, chatml, THOUGHTFUL)
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": THOUGHTFUL}) + "\n")
    options = {"tokenizer": chatml, "template": template, "seq_length": 200, "too_long": "reject"}
    with pytest.raises(InputError, match="data.turns apart"):
        build_conversations([file], tmp_path / "cache", **options)
    turns = Conversations(build_conversations([file], tmp_path / "cache", turns="apart", **options))
    assert len(turns) == 2
    for number, turn in enumerate((1, 3)):
        ids, is_response = turns[number]
        prompt = encode_prompt(template, chatml, THOUGHTFUL[:turn])
        assert ids[: len(prompt)].tolist() == prompt.tolist() and not is_response[: len(prompt)].any()
        assert is_response[len(prompt) :].all() and ids[-1] == chatml.eod
        assert chatml.decode(ids[len(prompt) : -1]) == THOUGHTFUL[turn]["content"]
        assert chatml.decode(prompt) == template.render(THOUGHTFUL[:turn], ask=True)
    assert "hm" not in chatml.decode(turns[1][0]), "forgotten by the second turn"


def test_turns_apart_are_those_together(tmp_path, tokenizer):
    """Of a template that rewrites nothing: the same tokens, each response marked once."""
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": TALK}) + "\n")
    options = {"tokenizer": tokenizer, "template": PlainTemplate(), "seq_length": 200, "too_long": "reject"}
    (whole, marked), *none = Conversations(build_conversations([file], tmp_path / "cache", **options))
    first, second = Conversations(build_conversations([file], tmp_path / "cache", turns="apart", **options))
    assert not none and second[0].tolist() == whole.tolist() and first[0].tolist() == whole[: len(first[0])].tolist()
    again = second[1].copy()
    again[: len(first[1])] |= first[1]
    assert again.tolist() == marked.tolist() and not (second[1][: len(first[1])] & first[1]).any()


def test_plain_text_may_spell_special_tokens(tokenizer):
    talk = [{"role": "user", "content": DEFAULT_EOD}, {"role": "assistant", "content": f"a {DEFAULT_EOD} b"}]
    ids, is_response = encode_chat(PlainTemplate(), tokenizer, talk)
    assert (ids == tokenizer.eod).sum() == 1
    assert tokenizer.decode(ids[is_response]) == f"a {DEFAULT_EOD} b{DEFAULT_EOD}"


def test_a_response_that_holds_the_end_of_a_document_is_refused(tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({DEFAULT_EOD: 0, "x": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "words.json"))
    tokenizer = Tokenizer(tmp_path / "words.json")
    assert tokenizer.eod in tokenizer.encode(f"x {DEFAULT_EOD} x"), "it is one of its ordinary words"
    talk = [{"role": "user", "content": f"x {DEFAULT_EOD}"}, {"role": "assistant", "content": "x x"}]
    ids, is_response = encode_chat(PlainTemplate(), tokenizer, talk)
    assert ids[is_response].tolist() == [1, 1, 0]
    for content in (f"x {DEFAULT_EOD} x", f"x {DEFAULT_EOD}"):
        with pytest.raises(InputError, match="a response holds the end-of-document token"):
            encode_chat(PlainTemplate(), tokenizer, [talk[0], {"role": "assistant", "content": content}])


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("chatml", None, "expected plain, a tokenizer_config.json or a .jinja file"),
        ("missing.jinja", None, "No such file"),
        ("missing.json", None, "no such file, or no chat_template in it"),
        ("broken.jinja", "{% for %}", "expected a Jinja chat template"),
        ("config.json", "[]", "no JSON object"),
        ("config.json", "{", "not JSON"),
        ("config.json", '{"chat_template": 3}', "no chat_template in it"),
    ],
)
def test_a_template_that_is_none_is_refused(tmp_path, tokenizer, name, content, reason):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=reason):
        make_template(str(tmp_path / name) if "." in name else name, tokenizer)
