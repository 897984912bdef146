"""token_weights.jsonl -> token_weights.html: what a browser would read out of it, and what is refused."""

import json
import logging
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_report import make_run

from megatron_ptrl.config import ReportConfig
from megatron_ptrl.errors import InputError
from megatron_ptrl.evaluation.report import run
from megatron_ptrl.evaluation.token_weights import SHOWN_DOCUMENTS, read_token_weights, write_token_weights

LINE = {
    "step": 40,
    "text": ["a", "b", "c"],
    "weight": [0.8, 1.2, 0.0],
    "gap": [-0.5, 0.75, 0.0],
    "loss_mask": [1, 1, 0],
}


class Page(HTMLParser):
    """Tags, the tokens of the documents as (class, style, title, text), and all text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.tokens: list[tuple[str, str, str, str]] = []
        self.documents: list[str] = []
        self._open: dict[str, str] | None = None
        self._in_document = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "div":
            self._in_document = True
            self.documents.append("")
        self._open = dict(attributes) if tag == "span" and self._in_document else None
        if self._open is not None:
            self.tokens.append((self._open["class"], self._open.get("style", ""), self._open["title"], ""))

    def handle_endtag(self, tag):
        self._in_document = self._in_document and tag != "div"

    def handle_data(self, data):
        if self._in_document:
            *others, before = self.tokens[-1]
            self.tokens[-1] = (*others, before + data)
            self.documents[-1] += data


def page(folder: Path, *lines: dict) -> Page:
    (folder / "token_weights.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = write_token_weights({"mine": folder}, folder / "out")
    assert path == folder / "out" / "token_weights.html"
    return Page(path)


def test_a_token_has_the_hue_of_its_side_and_weight_and_gap_on_hover(tmp_path):
    below, above, masked = page(tmp_path, LINE).tokens
    assert below == ("below", "--much: 60%", "weight 0.8000, gap -0.5000", "a")
    assert above == ("above", "--much: 60%", "weight 1.2000, gap +0.7500", "b")
    assert masked == ("masked", "", "in no loss", "c")


def test_the_strength_of_a_colour_grows_with_the_distance_from_one(tmp_path):
    tokens = page(tmp_path, LINE | {"weight": [1.0, 1.1, 0.0]}, LINE | {"weight": [0.9, 1.2, 0.0]}).tokens
    assert [style for kind, style, *_ in tokens if kind != "masked"] == [f"--much: {much}%" for much in (0, 30, 30, 60)]


def test_any_text_stays_text(tmp_path):
    texts = ["<script>alert(1)</script>", '"><img src=x onerror=y>', "&amp;\n"]
    read = page(tmp_path, LINE | {"text": texts})
    assert [text for *_, text in read.tokens] == [*texts[:2], "&amp;↵\n"]
    assert not {"script", "img"} & set(read.tags)
    source = (tmp_path / "out" / "token_weights.html").read_text()
    assert "http" not in source and "src=" not in source.replace("img src=x", "") and "url(" not in source


def test_control_characters_and_half_a_character_do_not_break_the_page(tmp_path):
    assert page(tmp_path, LINE | {"text": ["\x00", "\ud83d", "é"]}).documents == ["␀?é"]


def test_only_the_last_documents_are_shown(tmp_path):
    lines = [LINE | {"step": step, "text": [f"{step} ", "b", "c"]} for step in range(SHOWN_DOCUMENTS + 3)]
    assert [text[0] for text in page(tmp_path, *lines).documents] == [
        str(step) for step in range(3, SHOWN_DOCUMENTS + 3)
    ]


def test_all_masked_and_all_weights_one_can_be_drawn(tmp_path):
    assert [kind for kind, *_ in page(tmp_path, LINE | {"loss_mask": [0, 0, 0]}).tokens] == ["masked"] * 3
    assert page(tmp_path, LINE | {"weight": [1.0, 1.0, 0.0]}).tokens[0][1] == "--much: 0%"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"step": "4"}, 'step "4"; expected an integer'),
        ({"text": ["a", 2, "c"]}, "expected a list of strings"),
        ({"text": []}, "expected a list of strings"),
        ({"weight": [1.0, 1.0]}, "weight 2 entries; expected a list of 3"),
        ({"gap": None}, "gap null; expected a list of 3"),
        ({"weight": [1.0, -0.1, 1.0]}, r"weight\[1\] -0.1; expected a number >= 0"),
        ({"gap": [0.0, 0.0, float("nan")]}, r"gap\[2\] NaN; expected a finite number"),
        ({"loss_mask": [1, 0.5, 0]}, r"loss_mask\[1\] 0.5; expected 0 or 1"),
    ],
)
def test_a_bad_line_is_refused_by_file_and_line(tmp_path, change, message):
    (tmp_path / "token_weights.jsonl").write_text(f"{json.dumps(LINE)}\n{json.dumps(LINE | change)}\n")
    with pytest.raises(InputError, match=rf"token_weights\.jsonl:2 has .*{message}"):
        read_token_weights(tmp_path)


def test_what_is_not_json_is_refused_and_a_cut_off_last_line_left_out(tmp_path, caplog):
    path = tmp_path / "token_weights.jsonl"
    path.write_text(json.dumps(LINE) + '\n{"step": 41, "te')
    with caplog.at_level(logging.WARNING):
        assert [row.step for row in read_token_weights(tmp_path)] == [40]
    assert f"{path}:2 is cut off" in caplog.text
    path.write_text("nonsense\n" + json.dumps(LINE))
    with pytest.raises(InputError, match=r"token_weights\.jsonl:1 is not JSON"):
        read_token_weights(tmp_path)


def test_the_report_writes_the_page_where_a_run_has_weights(tmp_path, capsys):
    plain, weighted = make_run(tmp_path / "plain"), make_run(tmp_path / "weighted")
    run(ReportConfig(runs=[str(plain)]))
    assert not (plain / "plots" / "token_weights.html").exists()
    (weighted / "token_weights.jsonl").write_text(json.dumps(LINE) + "\n")
    run(ReportConfig(runs=[str(plain), str(weighted)], output=str(tmp_path / "out")))
    assert "token_weights.html" in capsys.readouterr().out
    source = (tmp_path / "out" / "token_weights.html").read_text()
    assert "<h2>weighted</h2>" in source and "<h2>plain</h2>" not in source
