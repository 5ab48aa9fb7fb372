"""The sentences the tasks are asked in, and the fixed sentences the model answers with.

Each placeholder is filled by `str.format`. The tokenizer takes its word tokens from here too.
"""

EXPRESSION = (
    "What is {e}?",
    "What is {e}",
    "Compute {e}.",
    "Calculate {e}.",
    "{e} = ?",
    "{e} =",
    "{e}",
    "How much is {e}?",
    "Work out {e}.",
    "Please compute {e}.",
    "Solve {e}.",
    "Can you calculate {e}?",
)
ADDITION = (
    "Please add up {list}.",
    "Add {list}.",
    "What is the sum of {list}?",
    "Sum up the numbers {list}.",
)
FOLLOW_UP_PLUS = ("Now add {n}.", "Add {n} to that.", "And plus {n}?", "Plus {n}?")
FOLLOW_UP_MINUS = ("Now subtract {n}.", "Subtract {n} from that.", "And minus {n}?", "Minus {n}?")

SORT_ASCENDING = (
    "Sort {list}.",
    "Sort these numbers: {list}",
    "Sort {list} from smallest to largest.",
    "Sort the numbers {list} in ascending order.",
    "Put {list} in order.",
)
SORT_DESCENDING = (
    "Sort {list} from largest to smallest.",
    "Sort the numbers {list} in descending order.",
    "Sort these numbers in descending order: {list}",
)

COMPARE_LARGER = (
    "Which is larger, {a} or {b}?",
    "Which number is bigger: {a} or {b}?",
    "What is greater, {a} or {b}?",
    "Which is more, {a} or {b}?",
)
COMPARE_SMALLER = (
    "Which is smaller, {a} or {b}?",
    "Which number is less: {a} or {b}?",
)
COMPARE_IS_LARGER = ("Is {a} larger than {b}?", "Is {a} greater than {b}?")
COMPARE_IS_SMALLER = ("Is {a} smaller than {b}?", "Is {a} less than {b}?")

COUNT_LETTERS = (
    "How many times does the letter {c} appear in {w}?",
    'How many times does "{c}" appear in "{w}"?',
    "Count the letter {c} in {w}.",
    "How many {c} are in {w}?",
    "How many {c}'s are there in the word {w}?",
    'How many letters {c} are in the word "{w}"?',
)

REVERSE = (
    "Reverse the word {w}.",
    'Reverse the word "{w}".',
    "Reverse {w}.",
    "Spell {w} backwards.",
    'Write "{w}" backwards.',
    "What is {w} backwards?",
)

COPY = (
    "Repeat: {t}",
    "Repeat after me: {t}",
    "Copy this text: {t}",
    "Copy: {t}",
    "Echo: {t}",
    "Say {t}",
    'Repeat "{t}"',
)

USE_CALCULATOR = (
    "Use the calculator: {e}",
    "Use the calculator to work out {e}.",
    "What is {e}? Use the calculator.",
    "Calculate {e} with the calculator.",
    "Please use the calculator tool for {e}.",
)
CALCULATOR_DESCRIPTIONS = (
    "Evaluate an arithmetic expression.",
    "Evaluates a mathematical expression.",
    "Calculates the value of an expression.",
    "A calculator.",
)
EXPRESSION_DESCRIPTIONS = (
    "The expression to evaluate.",
    "Arithmetic expression, for example 2 * 3.",
)
OTHER_TOOLS = (
    ("get_weather", "Get the current weather in a city.", "city"),
    ("search", "Search the web.", "query"),
    ("get_time", "Get the time in a location.", "location"),
)

GREETING = (
    "Hello",
    "Hello!",
    "Hi",
    "Hi!",
    "Hi there",
    "Hey",
    "Good morning",
    "Hello, how are you?",
)
WHO = (
    "Who are you?",
    "What are you?",
    "What is your name?",
    "What can you do?",
    "Help",
    "What model are you?",
    "Tell me about yourself.",
    "Introduce yourself.",
)
THANKS = ("Thanks", "Thank you", "Thank you!", "Thanks!")

GREETING_ANSWER = "Hello! I am the small built-in model of Inference-PIO. Ask me to add numbers."
WHO_ANSWER = (
    "I am the small built-in model of Inference-PIO. "
    "I can add, subtract, sort and compare numbers, count letters, reverse words, "
    "repeat text and call a calculator."
)
THANKS_ANSWER = "You are welcome."
NO_TOOL_ANSWER = "I have no calculator here."

NO_STEPS_THOUGHT = "No steps needed."
TOOL_CALL_THOUGHT = "Call the calculator."
TOOL_ANSWER_THOUGHT = "Read the result."
NO_TOOL_THOUGHT = "No calculator is given."

SYSTEM = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "You are the built-in model of Inference-PIO.",
    "Answer the question.",
    "You are concise.",
    "Be brief.",
)


def all_sentences() -> tuple[str, ...]:
    """Every sentence of this module in a fixed order, placeholders included."""
    sentences: list[str] = []
    for name, value in sorted(globals().items()):
        if not name.isupper():
            continue
        for item in (value,) if isinstance(value, str) else value:
            sentences.extend((item,) if isinstance(item, str) else item)
    return tuple(sentences)
