# ruff: noqa: RUF001 (texts in other scripts)
from __future__ import annotations

import json
from pathlib import Path

import pytest

from inference_pio.benchmarks.evaluation.language import detect_language, is_in_language

TEXTS = {
    "en": "Yesterday we walked along the river, and it was colder than we had expected.",
    "de": "Gestern gingen wir am Fluss entlang, und es war kälter, als wir gedacht hatten.",
    "it": "Ieri abbiamo camminato lungo il fiume e faceva più freddo di quanto pensassimo.",
    "pt": "Ontem caminhámos ao longo do rio e estava mais frio do que tínhamos pensado.",
    "es": "Ayer caminamos por el río y hacía más frío de lo que habíamos pensado.",
    "fr": "Hier nous avons marché le long de la rivière et il faisait plus froid que prévu.",
    "fi": "Eilen kävelimme joen rannalla, ja oli kylmempää kuin olimme ajatelleet.",
    "vi": "Hôm qua chúng tôi đi bộ dọc theo bờ sông và trời lạnh hơn chúng tôi nghĩ.",
    "sw": "Jana tulitembea kando ya mto na kulikuwa na baridi kuliko tulivyofikiri.",
    "nl": "Gisteren liepen we langs de rivier en het was kouder dan we hadden gedacht.",
    "ru": "Вчера мы гуляли вдоль реки, и было холоднее, чем мы думали.",
    "bg": "Вчера се разхождахме край реката и беше по-студено, отколкото очаквахме.",
    "ar": "مشينا أمس على طول النهر وكان الجو أبرد مما كنا نظن.",
    "fa": "دیروز کنار رودخانه قدم زدیم و هوا سردتر از آن بود که فکر می‌کردیم.",
    "ur": "کل ہم دریا کے کنارے چلے اور موسم ہماری سوچ سے زیادہ ٹھنڈا تھا۔",
    "hi": "कल हम नदी के किनारे टहले और मौसम हमारी सोच से अधिक ठंडा था।",
    "mr": "काल आम्ही नदीच्या काठाने चाललो आणि हवा आमच्या कल्पनेपेक्षा जास्त थंड होती.",
    "ne": "हिजो हामी नदीको किनारमा हिँड्यौं र मौसम हामीले सोचेको भन्दा चिसो थियो।",
    "bn": "গতকাল আমরা নদীর ধারে হেঁটেছিলাম।",
    "pa": "ਕੱਲ੍ਹ ਅਸੀਂ ਨਦੀ ਦੇ ਕੰਢੇ ਤੁਰੇ।",
    "gu": "ગઈકાલે અમે નદી કિનારે ચાલ્યા.",
    "ta": "நேற்று நாங்கள் ஆற்றங்கரையில் நடந்தோம்.",
    "te": "నిన్న మేము నది ఒడ్డున నడిచాము.",
    "kn": "ನಿನ್ನೆ ನಾವು ನದಿಯ ದಡದಲ್ಲಿ ನಡೆದೆವು.",
    "th": "เมื่อวานเราเดินเลียบแม่น้ำ",
    "ko": "어제 우리는 강을 따라 걸었습니다.",
    "ja": "昨日、私たちは川沿いを歩きました。",
    "zh": "昨天我们沿着河边散步。",
}


@pytest.mark.parametrize("language", TEXTS)
def test_a_sentence_of_each_language(language: str) -> None:
    assert detect_language(TEXTS[language]) == language
    for other in TEXTS:
        assert is_in_language(TEXTS[language], other) is (other == language)


def test_a_few_foreign_words_do_not_matter() -> None:
    assert detect_language("The word 'река' is Russian for river, said the teacher.") == "en"
    assert detect_language("अभी मैं Python और Linux सीख रहा हूँ।") == "hi"


@pytest.mark.parametrize("text", ["", "12 + 3 = 15", "…!?"])
def test_a_text_without_letters_is_in_every_language(text: str) -> None:
    assert detect_language(text) is None
    assert is_in_language(text, "kn")


def test_words_that_no_list_has_are_taken_for_the_scripts_first_language() -> None:
    assert detect_language("HELLO WORLD") == "en"


def test_every_language_of_the_data_is_known(task_sets: Path) -> None:
    asked = {
        arguments["language"]
        for line in (task_sets / "ifeval_input_data.jsonl").read_text().splitlines()
        for arguments in json.loads(line)["kwargs"]
        if "language" in arguments
    }
    assert len(asked) == 22
    assert asked <= TEXTS.keys()


def test_the_datas_own_prompts_are_english(task_sets: Path) -> None:
    rows = [
        json.loads(line)
        for line in (task_sets / "ifeval_input_data.jsonl").read_text().splitlines()
    ]
    others = [
        row["key"]
        for row in rows
        if "language:response_language" not in row["instruction_id_list"]
        and not is_in_language(row["prompt"], "en")
    ]
    assert len(others) <= 0.01 * len(rows), others
