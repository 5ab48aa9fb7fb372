"""The same question has about the same complexity in every language that the measure knows."""

# ruff: noqa: RUF001 - the punctuation of Chinese is meant

from __future__ import annotations

import pytest

from inference_pio.deployments.config import ThinkingConfig
from inference_pio.deployments.routing.complexity import Question, measure

LIKE_ENGLISH = 0.15
"""How far a translation's score may lie from the English one: one word of a kind, more or less."""

QUESTIONS: dict[str, dict[str, str]] = {
    "math": {
        "en": "Solve the equation 3x + 7 = 22.",
        "de": "Löse die Gleichung 3x + 7 = 22.",
        "es": "Resuelve la ecuación 3x + 7 = 22.",
        "fr": "Résous l'équation 3x + 7 = 22.",
        "zh": "求解方程 3x + 7 = 22。",
    },
    "word problem": {
        "en": "Anna has 5 apples, eats 2 and buys 8 more. How many does she have now?",
        "de": "Anna hat 5 Äpfel, isst 2 und kauft 8 neue. Wie viele hat sie jetzt?",
        "es": "Ana tiene 5 manzanas, come 2 y compra 8 más. ¿Cuántas tiene ahora?",
        "fr": "Anne a 5 pommes, en mange 2 et en achète 8. Combien en a-t-elle maintenant ?",
        "zh": "小明有5个苹果，吃了2个，又买了8个，现在有多少？",
    },
    "numbers as words": {
        "en": "What is the probability of rolling a sum of seven with two dice?",
        "de": "Wie groß ist die Wahrscheinlichkeit, mit zwei Würfeln die Summe sieben zu werfen?",
        "es": "¿Cuál es la probabilidad de sacar una suma de siete con dos dados?",
        "fr": "Quelle est la probabilité d'obtenir une somme de neuf avec deux dés ?",
        "zh": "掷两个骰子，点数之和为七的概率是多大？",
    },
    "code": {
        "en": "Write an SQL query that returns the ten customers with the most sales.",
        "de": "Schreibe eine SQL-Abfrage, die die zehn umsatzstärksten Kunden liefert.",
        "es": "Escribe una consulta SQL que devuelva los diez clientes con más ventas.",
        "fr": "Écris une requête SQL qui renvoie les dix clients avec le plus de ventes.",
        "zh": "请写一个SQL查询，找出销售额最高的十个客户。",
    },
    "code without spaces": {
        "en": "Implement a sorting algorithm in Python.",
        "de": "Implementiere einen Sortieralgorithmus als Python-Skript.",
        "es": "Implementa un algoritmo para ordenar en Python.",
        "fr": "Implémente un algorithme de tri en Python.",
        "zh": "用Python写一个排序算法。",
    },
    "proof": {
        "en": "Prove step by step that the square root of 2 is irrational.",
        "de": "Beweise Schritt für Schritt, dass die Wurzel aus 2 irrational ist.",
        "es": "Demuestra paso a paso que la raíz de 2 es irracional.",
        "fr": "Démontre étape par étape que la racine de 2 est irrationnelle.",
        "zh": "请逐步证明根号2是无理数。",
    },
    "reasons": {
        "en": "Why is the sky blue? Explain in detail.",
        "de": "Warum ist der Himmel blau? Erkläre es ausführlich.",
        "es": "¿Por qué el cielo es azul? Explícalo con detalle.",
        "fr": "Pourquoi le ciel est-il bleu ? Explique-le en détail.",
        "zh": "为什么天空是蓝色的？请详细解释。",
    },
}
SMALL = {
    "de": [
        "Hallo, wie geht es dir?",
        "Was ist die Hauptstadt von Frankreich?",
        "Wie hoch ist der Mount Everest?",
        "Übersetze 'good morning' ins Deutsche.",
        "Schönes Wetter heute, oder?",
    ],
    "es": [
        "Hola, ¿cómo estás?",
        "¿Cuál es la capital de Francia?",
        "¿Qué altura tiene el Everest?",
        "Traduce 'good morning' al español.",
        "Hace buen tiempo hoy, ¿verdad?",
    ],
    "fr": [
        "Bonjour, ça va ?",
        "Quelle est la capitale de la France ?",
        "Quelle est la hauteur de l'Everest ?",
        "Traduis « good morning » en français.",
        "Il fait beau aujourd'hui, non ?",
    ],
    "zh": [
        "你好，今天过得怎么样？",
        "法国的首都是哪里？",
        "珠穆朗玛峰有多高？",
        "把“早上好”翻译成英语。",
        "第二次世界大战是哪一年结束的？",
    ],
}


@pytest.mark.parametrize("language", ["de", "es", "fr", "zh"])
@pytest.mark.parametrize("kind", QUESTIONS)
def test_a_translation_looks_as_hard_as_the_question(kind: str, language: str) -> None:
    english = measure(Question(QUESTIONS[kind]["en"]))
    found = measure(Question(QUESTIONS[kind][language]))
    assert found.score == pytest.approx(english.score, abs=LIKE_ENGLISH)
    assert english.features[0] in found.features


@pytest.mark.parametrize(
    ("language", "text"), [(name, text) for name, texts in SMALL.items() for text in texts]
)
def test_small_talk_and_lookups_stay_small(language: str, text: str) -> None:
    assert measure(Question(text)).score < ThinkingConfig().think_from / 2


def test_lists_are_seen_in_chinese() -> None:
    assert "tasks" in measure(Question("一、翻译\n二、总结\n三、改写")).features
    assert "tasks" in measure(Question("1、翻译\n2、总结\n3、改写")).features


@pytest.mark.parametrize(
    "text",
    [
        "I explicitly told her about the social media rest day in Sept",
        "The programme for the tiers is on the plane",
    ],
)
def test_words_of_other_languages_are_not_seen_in_english(text: str) -> None:
    assert measure(Question(text)).features == ()
