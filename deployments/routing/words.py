"""The words that the complexity measure looks for, in English, German, Spanish, French, Chinese.

Whole words where a script has spaces, inflected ones by their stem; Chinese ones anywhere. Left out
is what means something else in another of the languages: a text's language is not asked for. Every
pattern is a plain alternation of words, its repetitions are bounded: its time is linear.
"""

from __future__ import annotations

import re


def _words(*spaced: str, chinese: str = "", flags: re.RegexFlag = re.NOFLAG) -> re.Pattern[str]:
    """One pattern for words in lower case; each argument is an alternation."""
    whole = rf"\b(?:{'|'.join(spaced)})\b"
    return re.compile(f"{whole}|{chinese}" if chinese else whole, flags)


NUMBER = _words(
    r"two|three|four|five|six|seven|eight|nine|ten|twelve|dozen|hundred|thousand|half|twice|third"
    r"|quarter|double|triple",
    r"zwei|drei|vier|fünf|sechs|sieben|acht|neun|zehn|zwölf|hundert|tausend|halb\w{0,2}"
    r"|anderthalb|doppelt|drittel|viertel",
    r"dos|tres|cuatro|cinco|seis|siete|ocho|nueve|diez|cien|mitad|doble",
    r"deux|trois|quatre|cinq|huit|neuf|dix|douze|mille|demie?|moitié",
    chinese="[两二三四五六七八九十百千万]",
)
"""Numbers as words. The Chinese "one" is in every sentence and counts for nothing."""

MATH = _words(
    r"how (?:many|much|long|far|old|fast)|solve|equations?|integrals?|derivatives?|integers?"
    r"|probability|percent|percentage|average|remainder|sum|ratio|fraction|polynomial|matrix"
    r"|triangle|square root|total|divided|multiplied|compute|calculate|prime|theorem",
    r"wie viele?|wie lange|löse|gleichung(?:en)?|ableitung|wahrscheinlichkeit|prozent"
    r"|\w{0,8}durchschnitt\w{0,16}|summe|bruch|primzahl(?:en)?|dreiecks?|wurzel|berechne\w{0,2}",
    r"cuánt[oa]s?|resuelve|ecuaci(?:ón|ones)|derivada|probabilidad|porcentaje|por ciento"
    r"|promedio|velocidad media|suma|fracción|triángulo|raíz|calcul[ae]",
    r"combien|résou[ds]|résoudre|équations?|dérivée|probabilité|pourcentage|pour cent|moyenne|somme"
    r"|racine|calculer?z?",
    chinese="多少|几个|方程|求解|计算|計算|概率|平均|百分之|之和|总共|导数|积分|根号|平方根|整数"
    "|质数|三角形",
)

CODE = _words(
    r"python|javascript|typescript|java|rust|golang|sql|regex|bash|html|css|function|algorithm"
    r"|code|script|bug|traceback|exception|compile[rs]?|unit tests?|api|class|recursi\w{1,4}"
    r"|refactor\w{0,3}|implement\w{0,5}",
    r"funktion(?:en)?|algorithmus|abfrage|skript|programmier\w{0,5}|klasse|implementier\w{0,4}",
    r"funci(?:ón|ones)|algoritmo|código|consulta|programa|implementa[rn]?",
    r"fonctions?|algorithme|requête|programmer|implément\w{1,3}",
    chinese="代码|函数|编程|程序|算法|实现|查询|报错|数据库|排序|缓存|线程",
    # An English word between Chinese characters has its ends all the same.
    flags=re.ASCII,
)

REASONING = _words(
    r"why|prove|proof|derive|explain|compare|contrast|analy[sz]e|evaluate|justify|design|plan"
    r"|optimi[sz]e|trade-?offs?|step by step|puzzle|logic\w{0,3}|deduce|infer|debug|strategy"
    r"|implications?|critique|consequences?|difference between|pros and cons",
    r"warum|wieso|weshalb|beweise\w{0,2}|erklär\w{0,4}|erläuter\w{0,3}|vergleiche\w{0,2}"
    r"|analysier\w{1,3}|untersuche\w{0,2}|begründe\w{0,2}|entwirf|optimier\w{1,3}"
    r"|schritt für schritt|vor- und nachteile|unterschied zwischen",
    r"por qué|demuestr[ae]\w{0,3}|demostrar|expl[ií](?:ca|que)\w{0,4}|compar[ae][rn]?"
    r"|analiz[ae]\w{0,2}|evalúa|justifi[cq]\w{1,3}|diseñ[ae]\w{0,2}|optimiza\w{0,2}"
    r"|paso a paso|ventajas y desventajas|diferencia entre",
    r"pourquoi|démontr\w{1,3}|prouve[rz]?|expliqu\w{1,3}|comparez|analyse[rz]"
    r"|évalue[rz]?|justifi(?:e|er|ez)|conçois|concevez|optimise[rz]"
    r"|étape par étape|avantages et (?:les )?inconvénients|différence entre",
    chinese="为什么|為什麼|证明|證明|解释|解釋|比较|对比|分析|评估|推导|逐步|设计|优化|优缺点|区别",
)

DEMAND = _words(
    r"must|should|at least|at most|exactly|do not|don't|without|make sure|ensure|include|also|then"
    r"|finally|each|every|both",
)
"""In English alone: in other languages such words are as common where nothing is demanded."""

STRUCTURE = _words(
    r"json|yaml|xml|csv|schema|table|markdown|bullet points?|in the format|latex",
    flags=re.ASCII,
)
