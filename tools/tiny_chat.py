"""Chat data for the bundled model, written by program: no person's conversation is in it.

Three kinds: questions about the documentation pages (answers are their own sentences), small
tasks whose answers are computed (counting, sums, lists, recall of what was said, copying), and a
fixed set of answers written for this file in tiny_answers.py. A conversation is a list of
(role, text) pairs. All randomness comes from the generator that the caller passes in.
"""

# ruff: noqa: SIM905  (word lists read better as text than as a hundred quoted strings)

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from tiny_answers import ANSWERS, JOKES, LISTS, SMALL_TALK, SYSTEM_PROMPTS, TRANSLATIONS, UNKNOWN
from tiny_corpus import POSTGRES, PYTHON, SQLITE, Definition, Page, Section

Conversation = list[tuple[str, str]]

ABBREVIATIONS = re.compile(r"\b(e\.g|i\.e|etc|vs|cf|Mr|Dr|St|No|Inc|approx|resp)\.$")
# A sentence that points at something outside itself cannot stand alone in an answer.
POINTS_ELSEWHERE = re.compile(
    r"\b(following|below|above|these|this section|this chapter|this document|this page|next section"
    r"|previous|here is|see|refer|table \d|figure|section \d|chapter \d|example|diagram|listed)\b",
    re.IGNORECASE,
)
DULL_TITLES = re.compile(
    r"^(note|notes|tip|warning|caution|important|examples?|description|parameters|compatibility"
    r"|see also|options|usage|overview|introduction|summary|author|return value|outputs|functions"
    r"|details|history|bugs|caveats|api reference|references|other .*|constants|objects|background"
    r"|\W*\d.*|what's new.*|.*release history.*|.*\d\.\d.*|build.*changes|optimizations|limitations"
    r"|table of contents|exit status|environment|diagnostics|porting.*|new .*|deprecated|removed)$",
    re.IGNORECASE,
)
UNASKED_KINDS = {"cmdoption", "2to3fixer", "pdbcommand", "struct"}
# Imperative verbs that open a definition, with the form that follows a subject.
VERBS = (
    "return add set get create remove delete convert write read call raise check test open close "
    "make build compute display print load save parse send receive register insert append replace "
    "split join copy move change find search determine enable disable start stop wait run execute "
    "print decode encode format compare locate initialize allocate release generate compile clear "
    "draw sort apply specify define retrieve list rename fetch control show store handle modify "
    "update attempt turn select construct extract invoke import do perform access flush accept "
    "process map increment decrement query schedule cancel acquire emit obtain reset bind"
).split()

SUBJECTS = {PYTHON: "in Python", POSTGRES: "in PostgreSQL", SQLITE: "in SQLite"}


@dataclass(frozen=True, slots=True)
class Topic:
    """One thing to ask about. `answers` holds its paragraphs, each a list of sentences."""

    source: str
    name: str
    kind: str
    answers: tuple[tuple[str, ...], ...]

    def brief(self) -> str:
        return self.answers[0][0]

    def normal(self) -> str:
        """Up to three sentences, and no more than about 90 words."""
        chosen: list[str] = []
        for sentence in self.answers[0][:3]:
            if chosen and sum(len(s) for s in chosen) + len(sentence) > 520:
                break
            chosen.append(sentence)
        return " ".join(chosen)

    def detailed(self) -> str:
        """Whole paragraphs, up to about 250 words."""
        chosen: list[str] = []
        for paragraph in self.answers:
            text = " ".join(paragraph)
            if chosen and sum(len(s) for s in chosen) + len(text) > 1500:
                break
            chosen.append(text)
        return "\n\n".join(chosen)


def sentences(text: str) -> list[str]:
    """Split a paragraph at full stops that end a sentence."""
    parts: list[str] = []
    start = 0
    for match in re.finditer(r"[.!?][\"')]*\s+(?=[A-Z\"'(`])", text):
        if ABBREVIATIONS.search(text[start : match.start() + 1]):
            continue
        parts.append(text[start : match.end()].strip())
        start = match.end()
    parts.append(text[start:].strip())
    return [part for part in parts if part]


def standalone(text: str) -> tuple[str, ...]:
    """The leading sentences of a paragraph that need nothing around them."""
    kept: list[str] = []
    for sentence in sentences(text):
        if POINTS_ELSEWHERE.search(sentence) or not sentence.rstrip("\"')").endswith((".", "!")):
            break
        if len(sentence) > 420:
            break
        kept.append(sentence)
    return tuple(kept)


def third_person(verb: str) -> str:
    if verb.endswith(("s", "sh", "ch", "x", "o")):
        return verb + "es"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + "s"


def with_subject(name: str, sentence: str) -> str:
    """'Return the size.' said of os.path.getsize becomes 'os.path.getsize returns the size.'"""
    first, _, rest = sentence.partition(" ")
    word = first.lower()
    if word in VERBS:
        return f"{name} {third_person(word)} {rest}"
    if word in map(third_person, VERBS):
        return f"{name} {word} {rest}"
    return sentence


def definition_topic(source: str, definition: Definition) -> Topic | None:
    name = definition.name.removeprefix("class ").removeprefix("c.")
    name = re.split(r"[\[(,=]| \(", name)[0].strip(" :")
    # Outside Python's pages a plain lower-case term is most often a parameter called "name".
    if source != PYTHON and name.islower() and "." not in name and "_" not in name:
        return None
    if not re.search(r"[A-Za-z]{3}", name) or len(name.split()) > 5 or name.startswith("-"):
        return None
    paragraphs = [standalone(p) for p in definition.paragraphs if not p.startswith("- ")]
    paragraphs = [p for p in paragraphs if p]
    if not paragraphs or paragraphs[0] != standalone(definition.paragraphs[0]):
        return None
    head = (with_subject(name, paragraphs[0][0]), *paragraphs[0][1:])
    return Topic(source, name, definition.kind, (head, *paragraphs[1:4]))


def section_topic(page: Page, section: Section) -> Topic | None:
    title = section.title
    reference = section.paragraphs()[:1] and section.paragraphs()[0].startswith(f"{title} - ")
    if reference:
        return reference_topic(page, section)
    title = title.partition(" - ")[0] if page.source == PYTHON else title
    if DULL_TITLES.match(title) or not 3 < len(title) < 70:
        return None
    prose = [p for p in section.paragraphs() if not p.startswith("- ")]
    paragraphs = [standalone(p) for p in prose[:5]]
    if not paragraphs or not paragraphs[0]:
        return None
    return Topic(page.source, title, "section", tuple(p for p in paragraphs if p))


def reference_topic(page: Page, section: Section) -> Topic | None:
    """A PostgreSQL command page: its one-line purpose, then its description."""
    name, _, purpose = section.paragraphs()[0].partition(" - ")
    described = [s for s in page.sections if s.title == "Description"]
    noun = "command" if name.isupper() else "program"
    head = f"The {name} {noun} is used to {purpose}"
    prose = described[0].paragraphs() if described else []
    paragraphs = [standalone(p) for p in prose[:4] if not p.startswith("- ")]
    paragraphs = [p for p in paragraphs if p]
    first = (head, *(paragraphs[0] if paragraphs else ()))
    return Topic(page.source, name, f"{noun}:{purpose.rstrip('.')}", (first, *paragraphs[1:]))


def topics_of(pages: list[Page]) -> list[Topic]:
    """Everything that can be asked about `pages`, in page order, one topic a name."""
    found: dict[tuple[str, str], Topic] = {}
    asked = {question.lower() for questions, _ in ANSWERS for question in questions}
    for page in pages:
        for section in page.sections:
            made = [section_topic(page, section)]
            made += [definition_topic(page.source, d) for d in section.definitions()]
            for topic in made:
                if topic is None or len(topic.normal()) < 25 or topic.kind in UNASKED_KINDS:
                    continue
                name = topic.name.lower()
                # What tiny_answers.py answers keeps that one answer.
                forms = (name, f"a {name}", f"an {name}", f"a {name[:-1]}", f"an {name[:-1]}")
                if not any(f"what is {form}?" in asked for form in forms):
                    found.setdefault((topic.source, name), topic)
    return list(found.values())


def ask(topic: Topic, rng: random.Random) -> tuple[str, str]:
    """One question about `topic` and the answer whose length its wording asks for."""
    where = SUBJECTS[topic.source]
    name = topic.name
    kind, _, purpose = topic.kind.partition(":")
    if kind in ("function", "method", "command", "program", "class", "macro"):
        plain = [
            "What is {n}?", "What does {n} do?", "What does {n} do {w}?", "Tell me about {n}.",
            "How do I use {n}?", "What is {n} used for?", "Explain {n}.", "What is {n} {w}?",
        ]  # fmt: skip
    elif kind == "section":
        plain = [
            "Tell me about {n} {w}.", "Tell me about {n}.", "Explain {n} {w}.", "Explain {n}.",
            "What do you know about {n}?", "What should I know about {n} {w}?",
            "What does the {s} documentation say about {n}?",
        ]  # fmt: skip
        if name.endswith("?"):
            plain = ["{n}", "I have a question: {n}", "{n} Please answer in a few sentences."]
    else:
        plain = ["What is {n}?", "What is {n} {w}?", "Explain {n}.", "Tell me about {n} {w}.",
                 "What does {n} mean {w}?"]  # fmt: skip
    if purpose and rng.random() < 0.4:
        plain = [f"How do I {purpose} {where}?", f"How can I {purpose} {where}?"]
    question = rng.choice(plain).format(n="\0", w=where, s=topic.source)
    shown = name
    style = rng.random()
    if kind in ("function", "method") and style < 0.3:
        shown = name + "()"
    if kind != "section" and 0.2 < style < 0.5:
        shown = f"`{shown}`"
    question = question.replace("\0", shown)
    length = rng.random()
    if length < 0.12:
        return rng.choice([
            question + " Answer in one sentence.", question + " Be brief.",
            "In one sentence: " + question, "Briefly, " + question[0].lower() + question[1:],
        ]), topic.brief()  # fmt: skip
    if length < 0.25:
        return rng.choice([
            question + " Explain in detail.", question + " Give a long answer.",
            question + " Please be detailed.",
        ]), topic.detailed()  # fmt: skip
    if length < 0.40:
        opening = rng.choice(["Please tell me: ", "Hi! ", "I have a question. ", "Hello. "])
        question = opening + question
    return question, topic.normal()


NAMES = (
    "Anna Ben Clara David Emma Felix Grace Henry Ida Jonas Kate Leo Maria Noah Olivia Paul Rosa "
    "Sam Tina Victor Alice Bob Carol Eve Frank Hannah Ivan Julia Karl Laura Mark Nina Oscar Peter "
    "Sara"
).split()
COLOURS = "red blue green yellow purple orange brown black white grey pink silver".split()
ANIMALS = (
    "cat dog horse bird fish rabbit fox owl bear mouse lion tiger frog duck goat sheep cow wolf "
    "eagle falcon otter badger dragon unicorn donkey monkey snake whale turtle pony swan robot "
    "giraffe elephant camel beaver spider bee ant crow parrot hamster hedgehog penguin zebra"
).split()
CITIES = "Paris London Berlin Rome Madrid Vienna Oslo Lisbon Athens Dublin Prague Warsaw".split()
FOODS = "bread soup pasta rice apples cheese salad pizza cake honey pears plums".split()
WORDS = (
    "apple river stone table window garden paper music summer winter candle bridge forest mountain "
    "ocean pencil mirror basket engine ladder hammer button pocket silver copper planet rocket "
    "market village castle island valley meadow thunder shadow ribbon orange lemon butter pepper"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()
ALPHABET = "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z".split()
NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()

Exchange = tuple[str, str]


def made_up(rng: random.Random) -> str:
    """A word that no list holds, so that copying it must be learned and not its value."""
    pairs = (rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(1, 3)))
    return "".join(pairs) + rng.choice(["", "n", "r", "s", "l", "x", "th", "ck"])


def any_name(rng: random.Random) -> str:
    return rng.choice(NAMES) if rng.random() < 0.5 else made_up(rng).capitalize()


def counting(rng: random.Random) -> Exchange:
    start = 1 if rng.random() < 0.6 else rng.randint(0, 60)
    last = start + rng.choice([4, 9, 9, 9, 14, 19, 19, 24, 29, 39, 49, 99])
    if rng.random() < 0.06:
        last = start + rng.choice([149, 199, 249, 299])
    numbers = list(range(start, last + 1))
    if rng.random() < 0.2 and last - start < 40:
        numbers.reverse()
        ask_for = rng.choice(["Count down from {b} to {a}.", "Count backwards from {b} to {a}."])
    else:
        ask_for = rng.choice([
            "Count from {a} to {b}.", "Count from {a} to {b}", "Please count from {a} to {b}.",
            "Can you count from {a} to {b}?", "Write the numbers from {a} to {b}.",
            "List the numbers from {a} to {b}.", "Count up from {a} to {b}, please.",
            "count from {a} to {b}", "Give me the numbers {a} to {b}.",
        ])  # fmt: skip
    return ask_for.format(a=start, b=last), ", ".join(map(str, numbers)) + "."


def number_words(rng: random.Random) -> Exchange:
    a = rng.randint(0, 8)
    b = rng.randint(a + 3, 20)
    if rng.random() < 0.5:
        return f"What is the word for the number {b}?", f"The word for {b} is {NUMBER_WORDS[b]}."
    return (
        f"Count from {NUMBER_WORDS[a]} to {NUMBER_WORDS[b]} in words.",
        ", ".join(NUMBER_WORDS[a : b + 1]) + ".",
    )


def stepping(rng: random.Random) -> Exchange:
    step = rng.choice([2, 2, 3, 4, 5, 5, 10, 10])
    count = rng.choice([5, 8, 10, 10, 12, 20])
    kind = rng.randrange(4)
    if kind == 0:
        numbers = [step * i for i in range(1, count + 1)]
        question = rng.choice(["List the first {c} multiples of {s}.",
                               "What are the first {c} multiples of {s}?"])  # fmt: skip
    elif kind == 1:
        numbers = [step * i for i in range(1, count + 1)]
        question = f"Count by {step}s up to {numbers[-1]}."
    elif kind == 2:
        first, name = rng.choice([(2, "even"), (1, "odd")])
        numbers = [first + 2 * i for i in range(count)]
        question = rng.choice([f"List the first {{c}} {name} numbers.",
                               f"What are the first {{c}} {name} numbers?"])  # fmt: skip
    else:
        numbers = [i * i for i in range(1, count + 1)]
        question = "List the first {c} square numbers."
    return question.format(c=count, s=step), ", ".join(map(str, numbers)) + "."


def sums(rng: random.Random) -> Exchange:
    kind = rng.randrange(4)
    if kind == 0:
        a, b = rng.randint(0, 99), rng.randint(0, 99)
        if rng.random() < 0.4:
            a, b = rng.randint(0, 12), rng.randint(0, 12)
        question, answer = f"{a} + {b}", a + b
        spoken = f"{a} plus {b}"
    elif kind == 1:
        a, b = rng.randint(0, 60), rng.randint(0, 40)
        a, b = max(a, b), min(a, b)
        question, answer = f"{a} - {b}", a - b
        spoken = f"{a} minus {b}"
    elif kind == 2:
        a, b = rng.randint(0, 12), rng.randint(0, 12)
        question, answer = f"{a} * {b}", a * b
        spoken = f"{a} times {b}"
    else:
        b, answer = rng.randint(1, 12), rng.randint(0, 12)
        a = answer * b
        question, spoken = f"{a} / {b}", f"{a} divided by {b}"
    form = rng.choice(["What is {q}?", "What is {q}?", "Calculate {q}.", "How much is {q}?",
                       "{q} = ?", "Compute {q}.", "{q}"])  # fmt: skip
    asked = spoken if rng.random() < 0.3 and "=" not in form else question
    return form.format(q=asked), f"{question} = {answer}."


def comparing(rng: random.Random) -> Exchange:
    a, b = rng.sample(range(100), 2)
    if rng.random() < 0.5:
        return f"Which number is larger, {a} or {b}?", f"{max(a, b)} is larger than {min(a, b)}."
    return f"Which number is smaller, {a} or {b}?", f"{min(a, b)} is smaller than {max(a, b)}."


def ordered_lists(rng: random.Random) -> Exchange:
    items, name, one = rng.choice([
        (DAYS, "days of the week", "day"), (MONTHS, "months of the year", "month"),
        (ALPHABET, "letters of the alphabet", "letter"),
    ])  # fmt: skip
    kind = rng.random()
    if kind < 0.4:
        question = rng.choice([
            f"List the {name}.", f"What are the {name}?", f"Name the {name}.",
            f"Can you list the {name}?", f"Tell me the {name}.", f"Please write down the {name}.",
        ])  # fmt: skip
        if one == "letter" and rng.random() < 0.4:
            question = rng.choice(["Say the alphabet.", "Write the alphabet.",
                                   "What is the alphabet?", "Recite the alphabet."])  # fmt: skip
        if rng.random() < 0.15:
            return question + " One per line.", "\n".join(f"- {x}" for x in items)
        return question, ", ".join(items) + "."
    i = rng.randrange(len(items) - 1)
    if kind < 0.7:
        question = rng.choice([f"Which {one} comes after {items[i]}?",
                               f"What {one} comes after {items[i]}?"])  # fmt: skip
        return question, f"{items[i + 1]} comes after {items[i]}."
    if kind < 0.9 or one == "letter":
        after = items[i + 1]
        return f"Which {one} comes before {after}?", f"{items[i]} comes before {after}."
    return f"What is the {one} after {items[i]}?", f"{items[i + 1]} comes after {items[i]}."


def known_lists(rng: random.Random) -> Exchange:
    questions, answer = rng.choice(LISTS)
    return rng.choice(questions), answer


def words_apart(rng: random.Random) -> Exchange:
    word = rng.choice(WORDS)
    kind = rng.randrange(5)
    if kind == 0:
        form = rng.choice(["Spell the word {w}.", "How do you spell {w}?", "Spell {w}."])
        return form.format(w=word), "-".join(word.upper()) + "."
    if kind == 1:
        return f"Write {word} in capital letters.", f"{word.upper()}"
    if kind == 2:
        letter, place = rng.choice([(word[0], "first"), (word[-1], "last")])
        return (
            f"What is the {place} letter of the word {word}?",
            f"The {place} letter of {word} is {letter.upper()}.",
        )
    if kind == 3:
        return (
            f"How many letters are in the word {word}?",
            f"The word {word} has {len(word)} letters.",
        )
    return f"Spell {word} backwards.", "-".join(reversed(word.upper())) + "."


def handling_lists(rng: random.Random) -> Exchange:
    pool = rng.choice([WORDS, ANIMALS, COLOURS, NAMES, CITIES, FOODS])
    pool = [*pool, *(made_up(rng) for _ in range(6))]
    items = rng.sample(pool, rng.randint(3, 7))
    shown = ", ".join(items)
    kind = rng.randrange(6)
    if kind == 0:
        return f"What is the first word of this list: {shown}?", f"The first word is {items[0]}."
    if kind == 1:
        return f"What is the last word of this list: {shown}?", f"The last word is {items[-1]}."
    if kind == 2:
        return f"Write this list in reverse order: {shown}.", ", ".join(reversed(items)) + "."
    if kind == 3:
        return f"How many words are in this list: {shown}?", f"The list has {len(items)} words."
    if kind == 4:
        return (
            f"Write this list with one item per line: {shown}.",
            "\n".join(f"- {item}" for item in items),
        )
    numbers = rng.sample(range(1, 100), rng.randint(3, 6))
    return (
        f"Sort these numbers: {', '.join(map(str, numbers))}.",
        ", ".join(map(str, sorted(numbers))) + ".",
    )


def repeating(rng: random.Random) -> Exchange:
    if rng.random() < 0.5:
        text = " ".join(rng.choices(WORDS + ANIMALS + COLOURS + NUMBER_WORDS, k=rng.randint(2, 12)))
    elif rng.random() < 0.4:
        text = " ".join(made_up(rng) for _ in range(rng.randint(1, 6)))
    else:
        text = " ".join(rng.choices("0123456789", k=rng.randint(3, 10)))
    form = rng.choice(["Repeat after me: {t}", "Say: {t}", "Repeat this: {t}", "Please repeat: {t}",
                       "Copy this text: {t}"])  # fmt: skip
    return form.format(t=text), text


def code_word(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.4:
        return "".join(rng.choices("0123456789", k=rng.choice([3, 4, 4, 5, 6])))
    parts = [rng.choice(COLOURS), rng.choice(ANIMALS), str(rng.randint(1, 99)), made_up(rng)]
    rng.shuffle(parts)
    return rng.choice(["-", "-", "-", " "]).join(parts[: rng.choice([2, 3, 3])])


def fact_to_remember(rng: random.Random) -> tuple[str, str, str, str]:
    """(what the user says, the reply, the later question, the answer to it)."""
    kind = rng.randrange(6)
    if kind == 0:
        x = any_name(rng)
        said = rng.choice([f"My name is {x}.", f"Hi, my name is {x}.", f"Hello, I am {x}."])
        return said, f"Nice to meet you, {x}!", "What is my name?", f"Your name is {x}."
    if kind == 1:
        x = rng.choice(COLOURS)
        return (f"My favourite colour is {x}.", f"I will remember that you like {x}.",
                "What is my favourite colour?", f"Your favourite colour is {x}.")  # fmt: skip
    if kind == 2:
        x = rng.choice(CITIES) if rng.random() < 0.6 else any_name(rng)
        return (f"I live in {x}.", f"I will remember that you live in {x}.",
                "Where do I live?", f"You live in {x}.")  # fmt: skip
    if kind == 3:
        x, n = rng.choice(ANIMALS), any_name(rng)
        return (f"I have a {x}. Its name is {n}.", f"{n} is a nice name for a {x}.",
                f"What is the name of my {x}?", f"Your {x} is called {n}.")  # fmt: skip
    if kind == 4:
        x = rng.choice(FOODS)
        return (f"I like to eat {x}.", f"I will remember that you like {x}.",
                "What do I like to eat?", f"You like to eat {x}.")  # fmt: skip
    x = code_word(rng)
    said = rng.choice([f"Remember this code: {x}", f"The code is {x}. Please remember it.",
                       f"Please remember the code {x}."])  # fmt: skip
    later = rng.choice(["What is the code?", "What was the code?", "Tell me the code."])
    return said, f"I will remember the code {x}.", later, f"The code is {x}."


def small_talk(rng: random.Random) -> Exchange:
    questions, answer = rng.choice(SMALL_TALK)
    return vary(rng.choice(questions), rng), answer


def vary(question: str, rng: random.Random) -> str:
    """The same words as people type them: without capitals or the last sign, now and then."""
    draw = rng.random()
    if draw < 0.08:
        question = question.lower()
    elif draw < 0.16:
        question = question.rstrip("?.!")
    elif draw < 0.20:
        question = question.lower().rstrip("?.!")
    return question


def known_answers(rng: random.Random) -> Exchange:
    questions, answer = rng.choice(ANSWERS)
    return vary(rng.choice(questions), rng), answer


def translations(rng: random.Random) -> Exchange:
    english, language, other = rng.choice(TRANSLATIONS)
    form = rng.choice(['How do you say "{e}" in {l}?', 'What is "{e}" in {l}?',
                       'Translate "{e}" into {l}.'])  # fmt: skip
    return form.format(e=english, l=language), f'"{english}" in {language} is "{other}".'


def jokes(rng: random.Random) -> Exchange:
    questions = [
        "Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Tell me something funny.",
        "Can you tell me a joke?", "A joke, please.",
    ]  # fmt: skip
    i = rng.randrange(len(questions))
    return questions[i], JOKES[i]


def stories(rng: random.Random) -> Exchange:
    """A long text of which the question decides every word: greedy decoding never wavers."""
    about = rng.random() < 0.6
    named = rng.random() < 0.4
    pool = ANIMALS if rng.random() < 0.7 else [*WORDS, *(made_up(rng) for _ in WORDS)]
    animal = rng.choice(pool) if about else "fox"
    name = any_name(rng) if named else "Clara"
    friend, city, thing, food = "Peter", "Vienna", "lantern", "bread"
    a_colour, a_thing = "a white", "a lantern"
    parts = [
        f"Once upon a time there was a child called {name} who lived near {city}.",
        f"{name} had {a_colour} {animal} and took it everywhere.",
        f"One morning {name} and the {animal} went for a walk and found {a_thing} on the road.",
        f'"Whose {thing} is this?" asked {name}, but nobody was there to answer.',
        f"So {name} carried the {thing} home and put it on the table.",
        f"In the evening a friend called {friend} knocked at the door.",
        f'"I have lost my {thing}," said {friend}. "I have looked for it all day."',
        f'{name} smiled and said: "Here it is. The {animal} and I found it this morning."',
        f"{friend} was very happy and gave them some {food} to say thank you.",
        f"They ate the {food} together, and the {animal} slept by the fire.",
        f"From that day on {name} and {friend} were the best of friends.",
        "And if they have not moved away, they still live there today.",
    ]
    if rng.random() < 0.35:
        question = rng.choice(["Tell me a short story", "Write a short story"])
        parts = [*parts[:3], parts[-2]]
    else:
        question = rng.choice(["Tell me a story", "Write a story", "Can you tell me a story",
                               "Write a long story", "Tell me a long story"])  # fmt: skip
    if about:
        question += f" about {'an' if animal[0] in 'aeiou' else 'a'} {animal}"
    if named:
        question += f" with a child called {name}"
    return question + ("?" if question.startswith("Can") else "."), " ".join(parts)


def unknown(rng: random.Random) -> Exchange:
    """A question outside everything above: the answer says so."""
    thing = rng.choice([*WORDS, *ANIMALS, *FOODS, made_up(rng), any_name(rng)])
    person = f"{any_name(rng)} {any_name(rng)}"
    form, others = rng.choice(UNKNOWN)
    question = form.format(t=thing, p=person, o=rng.choice(others) if others else "",
                           n=rng.randint(1200, 2030))  # fmt: skip
    return vary(question, rng), (
        "I am sorry, I do not know that. I am a very small model, and I know a little about "
        "Python, PostgreSQL and SQLite."
    )


TASKS: list[tuple[Callable[[random.Random], Exchange], float]] = [
    (counting, 3.0), (number_words, 0.8), (stepping, 1.2), (sums, 5.0), (comparing, 1.0),
    (ordered_lists, 2.5), (known_lists, 1.5), (words_apart, 1.5), (handling_lists, 2.0),
    (repeating, 3.0), (small_talk, 5.0), (known_answers, 9.0), (translations, 0.8), (jokes, 0.6),
    (stories, 2.5), (unknown, 2.5),
]  # fmt: skip


def exchange(topics: list[Topic], rng: random.Random) -> Exchange:
    """One question with its answer, of any kind."""
    if rng.random() < 0.35:
        return ask(rng.choice(topics), rng)
    tasks, weights = zip(*TASKS, strict=True)
    return rng.choices(tasks, weights)[0](rng)


def short_conversation(topics: list[Topic], rng: random.Random) -> Conversation:
    """One to four exchanges, with system prompts, follow-ups and recall among them."""
    turns: Conversation = []
    if rng.random() < 0.3:
        turns.append(("system", rng.choice(SYSTEM_PROMPTS)))
    if rng.random() < 0.01:
        asked = rng.choice(["What is my name?", "Do you know my name?"])
        return [*turns, ("user", asked), ("assistant", "You have not told me your name yet.")]
    fact = fact_to_remember(rng) if rng.random() < 0.25 else None
    if fact:
        turns += [("user", fact[0]), ("assistant", fact[1])]
    for _ in range(rng.choice([0, 1, 1, 2]) if fact else rng.choice([1, 1, 1, 2, 2, 3, 4])):
        question, answer = exchange(topics, rng)
        turns += [("user", question), ("assistant", answer)]
        if rng.random() < 0.12:
            turns += follow_up(turns, rng)
    if fact:
        turns += [("user", fact[2]), ("assistant", fact[3])]
    if rng.random() < 0.1:
        question, answer = rng.choice([
            ("Thanks!", "You are welcome!"), ("Thank you.", "You are welcome!"),
            ("Thank you very much!", "You are welcome!"), ("Goodbye!", "Goodbye! Have a nice day."),
            ("Great, thanks.", "You are welcome!"), ("Bye!", "Goodbye! Have a nice day."),
        ])  # fmt: skip
        turns += [("user", question), ("assistant", answer)]
    return turns


def follow_up(turns: Conversation, rng: random.Random) -> Conversation:
    """A question about the conversation itself; its answer is a copy of something said."""
    question, answer = turns[-2][1], turns[-1][1]
    kind = rng.randrange(4)
    if kind == 0:
        ask_for = rng.choice(["Please repeat that.", "Say that again.", "Repeat your last answer."])
        return [("user", ask_for), ("assistant", answer)]
    if kind == 1:
        first = next(text for role, text in turns if role == "user")
        return [("user", "What was my first message?"),
                ("assistant", f'Your first message was: "{first}"')]  # fmt: skip
    if kind == 2:
        return [("user", "What did I just ask?"), ("assistant", f'You asked: "{question}"')]
    return [("user", "What is the first sentence of your answer?"),
            ("assistant", sentences(answer)[0])]  # fmt: skip


def topic_conversation(topic: Topic, rng: random.Random) -> Conversation:
    """A question about one topic, at times with a request for more."""
    turns: Conversation = []
    if rng.random() < 0.15:
        turns.append(("system", rng.choice(SYSTEM_PROMPTS)))
    question, answer = ask(topic, rng)
    turns += [("user", question), ("assistant", answer)]
    told = " ".join(answer.split())
    if rng.random() < 0.2 and len(topic.answers) > 1:
        more = " ".join(topic.answers[1])
        if more not in told:
            ask_for = rng.choice(["Tell me more.", "Go on.", "What else?", "Please continue."])
            turns += [("user", ask_for), ("assistant", more)]
    return turns


def hidden_facts(rng: random.Random, count: int) -> list[tuple[str, str, str]]:
    """(sentence to hide in a text, question, answer), no two about the same thing."""
    facts: dict[str, tuple[str, str, str]] = {}
    colours, animals = rng.sample(COLOURS, count), rng.sample(ANIMALS, count)
    for colour, animal in zip(colours, animals, strict=True):
        code, name = code_word(rng), any_name(rng)
        door = f"The code of the {colour} door"
        thing, verb, value, question = rng.choice([
            ("The pass phrase", "is", code, "What is the pass phrase?"),
            ("The pass phrase", "is", code, "What is the pass phrase in the text?"),
            (door, "is", code, f"What is t{door[1:]}?"),
            (f"The {animal}", "is called", name, f"What is the name of the {animal}?"),
            (f"The {animal}", "lives in", name, f"Where does the {animal} live?"),
        ])  # fmt: skip
        sentence = f"{thing} {verb} {value}."
        facts.setdefault(thing, (sentence, question, sentence))
    return list(facts.values())


def reading_conversation(page: Page, rng: random.Random, chars_max: int) -> Conversation:
    """A pasted text with facts hidden in it, and questions that need the text."""
    blocks = [b for s in page.sections for b in s.paragraphs() if not b.startswith("- ")]
    start = rng.randrange(max(1, len(blocks) - 3))
    passage: list[str] = []
    for block in blocks[start:]:
        if sum(map(len, passage)) + len(block) > chars_max and passage:
            break
        passage.append(block)
    first_sentence = sentences(passage[0])[0]
    questions: list[Exchange] = []
    for said, question, answer in hidden_facts(rng, rng.randint(1, 4)):
        questions.append((question, answer))
        at = rng.randint(1, len(passage))
        if rng.random() < 0.5:
            passage.insert(at, said)
        else:
            passage[at - 1] += " " + said
    ask_first = rng.choice(["What is the first sentence of the text?",
                            "Repeat the first sentence of the text.",
                            "What is the first sentence?"])  # fmt: skip
    questions.append((ask_first, first_sentence))
    titled = rng.random() < 0.6
    if titled and rng.random() < 0.3:
        questions.append((rng.choice(["What is the title of the text?", "What is the text about?"]),
                          f'The title of the text is "{page.title}".'))  # fmt: skip
    if rng.random() < 0.2:
        questions.append(("Is the text about Python, PostgreSQL or SQLite?",
                          f"The text is about {page.source}."))  # fmt: skip
    rng.shuffle(questions)
    head = rng.choice(["Read this text:\n\n", "Here is a text:\n\n", "", "",
                       "Please read the following text.\n\n"])  # fmt: skip
    text = head + (f"# {page.title}\n\n" if titled else "") + "\n\n".join(passage)
    turns: Conversation = []
    for i, (question, answer) in enumerate(questions):
        turns += [("user", f"{text}\n\n{question}" if i == 0 else question), ("assistant", answer)]
    return turns


def long_conversation(topics: list[Topic], rng: random.Random, chars_max: int) -> Conversation:
    """Many exchanges up to `chars_max` characters, with facts told early and asked for late."""
    turns: Conversation = [("system", rng.choice(SYSTEM_PROMPTS))] if rng.random() < 0.5 else []
    facts = {}
    for _ in range(rng.randint(1, 3)):
        fact = fact_to_remember(rng)
        facts.setdefault(fact[2].split()[-1], fact)
    open_facts = list(facts.values())
    for fact in open_facts:
        turns += [("user", fact[0]), ("assistant", fact[1])]
    while sum(len(text) for _, text in turns) < chars_max:
        question, answer = exchange(topics, rng)
        turns += [("user", question), ("assistant", answer)]
        if rng.random() < 0.08:
            turns += follow_up(turns, rng)
        if rng.random() < 0.08:
            fact = rng.choice(open_facts)
            turns += [("user", fact[2]), ("assistant", fact[3])]
    for fact in open_facts:
        turns += [("user", fact[2]), ("assistant", fact[3])]
    return turns
