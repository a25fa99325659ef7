"""The human study: the page shows what is to be judged, and what raters said is counted right."""
import json
import re
from pathlib import Path

import pytest
import rating
from conftest import noise

from model import UserError
from rollout import Frame, Question, Trace, crop_box, format_call, parse_turn

HOSTILE = "</script><script>document.title = 'broken'</script>"


def make_trace(text="Which?"):
    """A zoom call on what is asked about, then an answer."""
    regions = [{"box": [20, 200, 70, 250], "name": "dotted"}]
    question = Question(text, [noise(256, 256)], "dotted", regions=regions)
    texts = [f"<think>It is at (11, 56).</think>\n{format_call((11, 56))}",
             "<think>Not at (60, 3).</think>\n<answer> dotted </answer>"]
    turns = [parse_turn(text) for text in texts]
    turns[0].crop = crop_box((256, 256), (44, 224), 32)
    return Trace(None, question=question, frames=[Frame((64, 64), (256, 256))], turns=turns,
                 ended="answer")


def data_of(path):
    page = path.read_text(encoding="utf-8")
    found = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)
    assert len(found) == 1 and page.count("</script>") == 2
    return json.loads(found[0])


def test_the_page_has_each_point_once(tmp_path):
    """Guards what is rated: a point and the zoom call at it are one step, the truth of each is
    known, and no text ends the script; without a point it is said, and no page is written."""
    page = tmp_path / "rate.html"
    blind = make_trace()
    blind.turns = [parse_turn("<answer> dotted </answer>")]
    with pytest.raises(UserError, match="no trace has a point"):
        rating.write_rating_page(page, "", [blind])
    assert not page.exists()
    rating.write_rating_page(page, HOSTILE, [make_trace(HOSTILE), make_trace()])
    data = data_of(page)
    assert data["title"] == HOSTILE
    truths = [(step["case"], step["place"], step["truth"]) for step in data["steps"]]
    assert sorted(truths) == [(0, 0, True), (0, 1, False), (1, 0, True), (1, 1, False)]
    assert data["cases"][0]["traces"][0]["points"][0]["at"] == [44, 224]


def test_fleiss_kappa_of_the_textbook():
    """Guards the formula, by the example of Fleiss (1971): ten things, fourteen raters."""
    counts = [[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
              [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]]
    assert rating.fleiss_kappa(counts) == pytest.approx(0.210, abs=5e-4)
    assert rating.fleiss_kappa([[2, 0], [2, 0]]) == 1


def test_a_scripted_rater(tmp_path, capsys):
    """Guards the way from the page to the figures: one rater knows the truth, the other says yes to
    all, so that they agree in half; a file that is none is named."""
    rating.write_rating_page(tmp_path / "rate.html", "", [make_trace() for _ in range(20)])
    data = data_of(tmp_path / "rate.html")
    paths = [str(tmp_path / name) for name in ("knows.json", "agrees.json")]
    for path in paths:
        rows = [{"id": step["id"], "truth": step["truth"], "helps": 4,
                 "on": "yes" if step["truth"] or "agrees" in path else "no"}
                for step in data["steps"]]
        Path(path).write_text(json.dumps({"key": data["key"], "ratings": rows}))
    rating.print_ratings(paths)
    out = capsys.readouterr().out
    assert "points on the thing named: 20 of 40, 0.500" in out
    assert "agrees with the truth: 40 of 40" in out and "helpfulness, 1 to 5: 4.00" in out
    assert "kappa of 'on', 40 steps: -0.333" in out
    for text in ("", "[]", '{"key": "a"}', '{"key": "a", "ratings": [{}]}'):
        Path(paths[1]).write_text(text)
        with pytest.raises(UserError, match="agrees.json: cannot be read"):
            rating.print_ratings(paths)
