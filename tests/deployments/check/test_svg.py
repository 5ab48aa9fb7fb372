from __future__ import annotations

from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from inference_pio.deployments.check.nodes import NodeType
from inference_pio.deployments.check.review import review_file
from inference_pio.deployments.check.svg import draw, width

CONFIGS = Path(__file__).resolve().parents[3] / "cluster_configs"
FILES = sorted(path.name for path in CONFIGS.glob("*.yaml"))
SPACE = "{http://www.w3.org/2000/svg}"

Box = tuple[float, float, float, float]


def boxes(root: ElementTree.Element) -> list[Box]:
    """Left, top, right, bottom of every box, the background left out."""
    found = []
    for rect in root.findall(f"{SPACE}rect"):
        if "x" in rect.attrib:
            x, y, w, h = (float(rect.attrib[key]) for key in ("x", "y", "width", "height"))
            found.append((x, y, x + w, y + h))
    return found


def texts(root: ElementTree.Element) -> list[tuple[str, Box]]:
    found = []
    for text in root.findall(f"{SPACE}text"):
        words, size = text.text or "", int(text.attrib["font-size"])
        x, y, w = float(text.attrib["x"]), float(text.attrib["y"]), width(words, size)
        left = x - {"start": 0, "middle": w / 2, "end": w}[text.attrib["text-anchor"]]
        found.append((words, (left, y - 0.8 * size, left + w, y + 0.2 * size)))
    return found


def crosses(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def contains(a: Box, b: Box) -> bool:
    return a[0] <= b[0] and a[1] <= b[1] and a[2] >= b[2] and a[3] >= b[3]


def many(tmp_path: Path) -> Path:
    """A wide grid, many replicas, long names and several pools that share a prefill pool."""
    pools = [
        {"name": "prefill", "role": "prefill", "engine": {"parallel": {"tensor": 2}}},
        {"name": "second-prefill", "role": "prefill"},
        *(
            {
                "name": f"decode-{index}",
                "role": "decode",
                "served_model_name": "a-rather-long-public-name-of-a-model-with-a-version-2507",
                "prefill": {"pool": "prefill" if index % 2 else "second-prefill"},
                "replicas": 5,
            }
            for index in range(4)
        ),
        {
            "name": "grid",
            "served_model_name": "a-rather-long-public-name-of-a-model-with-a-version-2507",
            "engine": {"parallel": {"tensor": 4, "pipeline": 3, "sequence_from": 64}},
        },
    ]
    application = {
        "name": "a",
        "import_path": "inference_pio.deployments.app:build",
        "args": {
            "pools": pools,
            "served_model_name": "a-rather-long-public-name-of-a-model-with-a-version-2507",
        },
    }
    path = tmp_path / "many.yaml"
    path.write_text(yaml.safe_dump({"applications": [application]}))
    return path


@pytest.mark.parametrize("name", [*FILES, "many"])
def test_no_text_leaves_its_box_or_meets_another(name: str, tmp_path: Path) -> None:
    root = ElementTree.fromstring(
        draw(review_file(many(tmp_path) if name == "many" else CONFIGS / name))
    )
    rects, words = boxes(root), texts(root)
    for text, place in words:
        for rect in rects:
            assert contains(rect, place) or not crosses(rect, place), f"{text!r} crosses an edge"
    for (one, first), (two, second) in combinations(words, 2):
        assert not crosses(first, second), f"{one!r} meets {two!r}"
    for first, second in combinations(rects, 2):
        inside = contains(first, second) or contains(second, first)
        assert inside or not crosses(first, second), "two boxes cross"
    whole = (0.0, 0.0, float(root.attrib["width"]), float(root.attrib["height"]))
    assert all(contains(whole, place) for _, place in words)


def test_everything_is_in_the_drawing() -> None:
    root = ElementTree.fromstring(draw(review_file(CONFIGS / "disaggregated.yaml")))
    shown = [text for text, _ in texts(root)]
    for word in ("ingress", "router", "prefill", "thinking", "answer"):
        assert word in shown
    assert sum(text.startswith("rank 0") for text in shown) == 3
    handoffs = [p for p in root.findall(f"{SPACE}path") if "#kv" in p.attrib["marker-end"]]
    assert len(handoffs) == 2


def test_many_replicas_are_counted_not_drawn(tmp_path: Path) -> None:
    root = ElementTree.fromstring(draw(review_file(many(tmp_path))))
    shown = [text for text, _ in texts(root)]
    assert shown.count("and 2 more replicas") == 4


def test_no_font_and_no_other_file_is_needed() -> None:
    drawn = draw(review_file(CONFIGS / "full.yaml"))
    assert 'font-family="sans-serif"' in drawn
    assert "href" not in drawn
    assert "http" not in drawn.replace('xmlns="http://www.w3.org/2000/svg"', "")


@pytest.mark.parametrize("picture", sorted((CONFIGS.parent / "docs/pictures").glob("*.svg")))
def test_the_drawings_in_the_documentation_are_of_the_files(
    picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = CONFIGS / f"{picture.stem}.yaml"
    if not file.is_file():
        pytest.skip("a drawing of something else")
    big = NodeType("this machine", 1, {"CPU": 64}, 2**40)
    monkeypatch.setattr("inference_pio.deployments.check.review.this_machine", lambda _config: big)
    assert draw(review_file(file)) == picture.read_text(), (
        "draw it again: inference-pio check --svg"
    )
