# ruff: noqa: RUF001 (letters of other scripts are what is looked for)
"""Which language a text is in: by its script, and where several share one, by frequent words.

Made for the languages of IFEval. It has no opinion on texts without letters.
"""

from __future__ import annotations

import re
from collections import Counter

_RANGES: dict[str, tuple[tuple[int, int], ...]] = {
    "latin": ((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F), (0x1E00, 0x1EFF)),
    "cyrillic": ((0x400, 0x52F),),
    "arabic": ((0x600, 0x6FF), (0x750, 0x77F)),
    "devanagari": ((0x900, 0x97F),),
    "bengali": ((0x980, 0x9FF),),
    "gurmukhi": ((0xA00, 0xA7F),),
    "gujarati": ((0xA80, 0xAFF),),
    "tamil": ((0xB80, 0xBFF),),
    "telugu": ((0xC00, 0xC7F),),
    "kannada": ((0xC80, 0xCFF),),
    "thai": ((0xE00, 0xE7F),),
    "kana": ((0x3040, 0x30FF),),
    "han": ((0x4E00, 0x9FFF),),
    "hangul": ((0xAC00, 0xD7AF), (0x1100, 0x11FF)),
}
_OF_ONE_LANGUAGE = {
    "bengali": "bn",
    "gurmukhi": "pa",
    "gujarati": "gu",
    "tamil": "ta",
    "telugu": "te",
    "kannada": "kn",
    "thai": "th",
    "kana": "ja",
    "han": "zh",
    "hangul": "ko",
}
_WORDS: dict[str, dict[str, str]] = {
    "latin": {
        "en": "the of and to in is that it for was with as on are this be by you not have from or "
        "an at but they his her we my your all will can what there which their if has do one "
        "would about who so when i he she",
        "de": "der die das und ist nicht ein eine zu den von mit sich auf für im dem des ich sie "
        "es auch als an werden aus er hat dass wir oder sind wie einer einen bei noch nach war "
        "wird über um kann ihr",
        "it": "il la di che e un una per non sono con del della le si da in è i al lo gli come ma "
        "più anche dei nel questo alla ha delle mi ti ci se mia tuo degli nella io",
        "pt": "o a de que e do da em um uma para não com os as se na no por mais dos das como mas "
        "foi ao ele tem seu sua ou ser quando muito há nos já está eu também só pelo pela você "
        "isso são",
        "es": "el la de que y en un una los las por con no para se del al lo como más pero sus le "
        "ya o este sí porque esta entre cuando muy sin sobre también me hasta hay es está yo",
        "fr": "le la les de des et un une est pas que qui dans pour sur au avec ce il elle je nous "
        "vous plus par mais ou sont être cette aux se du en ne son sa ses",
        "fi": "ja on ei se että en hän oli mutta ovat kun niin myös joka tai minä sinä tämä kuin "
        "olen ole sen voi jos mitä hyvin nyt me he ne tämän joka jotka sekä oma minun olla",
        "vi": "và của là có không một người cho các được trong với này đã những khi tôi bạn đó "
        "ở để về nhiều cũng như rất nhưng sẽ làm từ chúng ta phải năm vào đến",
        "sw": "na ya wa kwa ni la katika za kuwa hii cha yake kama hiyo huo watu sana lakini pia "
        "mimi wewe yeye sisi wao hakuna au vya ili bila mtu huyu hizi kila siku alikuwa wangu",
        "nl": "de het een en van ik je dat niet is in op te zijn voor met die aan er maar om hij "
        "ze wat ook als dit bij naar heeft wordt we was dan had hadden waren uit over",
    },
    "cyrillic": {
        "ru": "и в не на я что он с как это по но они мы она к из у за так же то вы от его было "
        "бы для все только если или есть когда мне был меня ещё нет о их",
        "bg": "и на да не се в е за от с че по са до като това ще но във ни си ми към при или "
        "който което която които има го тя той те след само още при беше",
    },
    "arabic": {
        "ar": "في من على أن إلى التي هذا هذه الذي كان عن مع ما لا هو هي كل بعد قد بين أو ذلك كما "
        "لم إن ثم حيث كانت هناك و",
        "fa": "و در به از که این را با است برای آن یک می های هم تا بر شود شد است خود ما من شما او "
        "نیز یا اما هر باید بود دارد کرد چه",
        "ur": "کے کی میں ہے اور سے کا کو پر یہ نے ہیں کہ اس ایک نہیں بھی تھا وہ جو ہم آپ کر ان تو "
        "لیے گیا ہو کیا تھی ہی اپنے",
    },
    "devanagari": {
        "hi": "है के में की और से का को पर हैं यह कि नहीं एक भी था इस ने लिए तो कर हो जो मैं आप "
        "वह हम थे अपने या थी ही गया साथ करने",
        "mr": "आहे आणि या व ते हे की तो ती मी आहेत नाही एक होता होते त्या मध्ये साठी केले असे "
        "आपल्या त्यांच्या झाले पण आम्ही तुम्ही काही आपण हा ही",
        "ne": "छ र को मा हो लाई ले भएको पनि छन् गर्न यो एक तथा गरेको हुन् थियो त्यो म हामी तपाईं "
        "गर्ने हुन्छ भने तर छैन गरेर सबै नेपाल",
    },
}
_VOCABULARY = {
    script: {language: frozenset(words.split()) for language, words in languages.items()}
    for script, languages in _WORDS.items()
}
# Letters that one language of a script has and the others do not: a short text may lack the words.
_LETTERS: dict[str, str] = {
    "ru": "ыэё",
    "bg": "",
    "fa": "گچپژ",
    "ur": "ٹڈڑںےھہ",
    "ar": "ةىكيإؤ",
    "de": "ßäü",
    "vi": "đơưạảấầẩẫậắằẳẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủứừửữựỳỵỷỹ",
    "pt": "ãõ",
    "fi": "äö",
    "mr": "ळ",
}
_WORD = re.compile(r"[^\s\d.,;:!?()\[\]{}\"'“”‘’«»।॥،؛؟*#/\\|<>=+~`_…—–-]+")
_SAMPLE = 20_000


def detect_language(text: str) -> str | None:
    """The ISO 639-1 code of the likeliest language; ``None`` for a text without known letters."""
    lowered = text[:_SAMPLE].lower()
    scripts = Counter(script for letter in lowered if (script := _script_of(letter)))
    if not scripts:
        return None
    script = scripts.most_common(1)[0][0]
    if script == "han" and scripts["kana"]:
        script = "kana"
    if script in _OF_ONE_LANGUAGE:
        return _OF_ONE_LANGUAGE[script]
    return _by_words(lowered, script)


def is_in_language(text: str, language: str) -> bool:
    """Whether a text is in that language; one that cannot be told passes."""
    return detect_language(text) in (None, language)


def _script_of(letter: str) -> str | None:
    code = ord(letter)
    for script, ranges in _RANGES.items():
        if any(low <= code <= high for low, high in ranges):
            return script
    return None


def _by_words(lowered: str, script: str) -> str:
    """The language with the most of its frequent words and own letters; the first without any."""
    languages = _VOCABULARY[script]
    words = Counter(_WORD.findall(lowered))
    letters = Counter(lowered)
    scores = {
        language: sum(words[word] for word in vocabulary)
        + sum(letters[letter] for letter in _LETTERS.get(language, "")) / 4
        for language, vocabulary in languages.items()
    }
    best = max(scores, key=lambda language: scores[language])
    return best if scores[best] > 0 else next(iter(languages))
