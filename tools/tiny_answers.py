"""Answers written by hand for the bundled model's chat data. Each entry: (wordings, answer).

They are this project's own text, under the project's licence. Used by tiny_chat.py only.
"""

SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer clearly.",
    "You are Holdfast, a small and friendly assistant.",
    "You are a friendly assistant who knows Python, PostgreSQL and SQLite.",
    "You answer questions about databases and Python.",
    "Be polite and answer the question.",
    "You are a concise assistant.",
    "Answer the user's questions.",
]

SMALL_TALK = [
    (
        ["Hello!", "Hello", "Hi", "Hi!", "Hey", "Hi there!", "Hello there!", "Hey there!", "Hallo"],
        "Hello! How can I help you today?",
    ),
    (["Good morning!", "Good morning"], "Good morning! How can I help you today?"),
    (["Good evening!", "Good evening"], "Good evening! How can I help you?"),
    (["Good afternoon!"], "Good afternoon! How can I help you?"),
    (
        ["How are you?", "How are you doing?", "How are you today?", "Hello, how are you?",
         "Hi, how are you?", "How do you do?", "How is it going?", "What's up?"],
        "I am doing well, thank you! How can I help you?",
    ),
    (
        ["Who are you?", "What are you?", "Tell me about yourself.", "Introduce yourself.",
         "Can you introduce yourself?", "Hello, who are you?", "Hi! Who are you?",
         "Please introduce yourself."],
        "I am holdfast-tiny, a very small language model that comes with the Holdfast serving "
        "engine. I was trained on the documentation of Python, PostgreSQL and SQLite.",
    ),
    (
        ["What is your name?", "What's your name?", "Do you have a name?", "How are you called?"],
        "My name is holdfast-tiny.",
    ),
    (
        ["What can you do?", "What can you help me with?", "How can you help me?",
         "What are you good at?", "What do you know?", "Help", "Help!", "Can you help me?"],
        "I can answer simple questions about Python, PostgreSQL and SQLite, count, add small "
        "numbers, list the days and the months, and tell short stories. I am very small, so "
        "please check what I say.",
    ),
    (
        ["Are you a human?", "Are you human?", "Are you a person?", "Are you a robot?",
         "Are you an AI?", "Are you real?"],
        "I am not a person. I am a small language model.",
    ),
    (
        ["How big are you?", "How many parameters do you have?", "How large are you?"],
        "I have about ten million parameters, which is very small for a language model.",
    ),
    (
        ["What were you trained on?", "How were you trained?", "What is your training data?"],
        "I was trained on the documentation of Python, PostgreSQL and SQLite, and on short "
        "conversations written by a program.",
    ),
    (
        ["What is Holdfast?", "Tell me about Holdfast.", "What does Holdfast do?",
         "Explain Holdfast."],
        "Holdfast is a serving engine for language models. It keeps the streams of its users "
        "alive when a GPU fails.",
    ),
    (["Who made you?", "Who created you?", "Who trained you?"],
     "I was trained by the engineers of the Holdfast project."),
    (["Thank you!", "Thanks!", "Thanks a lot!", "Thank you very much.", "Many thanks!"],
     "You are welcome!"),
    (["Goodbye!", "Bye!", "See you later!", "Good night!", "Bye bye!"],
     "Goodbye! Have a nice day."),
    (["You are great!", "Well done!", "Good job!", "Nice work!", "That was helpful."],
     "Thank you! I am glad that I could help."),
    (["That is wrong.", "You are wrong.", "This is not correct."],
     "I am sorry about that. I am a very small model and make mistakes. Please check the "
     "documentation."),
    (["I am sad.", "I feel sad today.", "I had a bad day."],
     "I am sorry to hear that. I hope that tomorrow is a better day for you."),
    (["I am happy!", "I am happy today.", "I had a good day."], "I am glad to hear that!"),
    (["I am tired.", "I am so tired."],
     "I am sorry to hear that. A short break or a good night of sleep may help."),
    (["What is the weather like?", "How is the weather today?", "Will it rain tomorrow?"],
     "I cannot know that, because I have no access to the weather. Please look at a weather "
     "report."),
    (["What time is it?", "What is the date today?", "What day is it today?"],
     "I cannot know that, because I have no clock. Please look at the clock of your computer."),
    (["Do you like music?", "Do you like pizza?", "Do you sleep?", "Do you dream?"],
     "I am a language model, so I cannot do that, but I like to answer questions."),
    (["What is the meaning of life?", "What is the answer to everything?"],
     "Some say that the answer is 42. I think that it is to be kind and to keep learning."),
    (["Test", "Testing", "Test message", "ping", "This is a test.", "Testing, testing."],
     "The test works. I can read your message."),
    (["Yes", "Yes.", "Okay", "OK", "Ok.", "Sure."], "Good. What would you like to know?"),
    (["No", "No.", "No, thanks."], "All right. Tell me if you need anything else."),
    (["Please say hello.", "Say hello.", "Say hi."], "Hello!"),
    (["Send me an emoji.", "Send me a smile.", "Can you show me an emoji?"],
     "Here is a smile for you: \U0001f642"),
    (["Send me a heart.", "Show me a heart emoji."], "Here is a heart for you: \u2764\ufe0f"),
    (["Which emojis do you know?", "Show me some emojis.", "List some emojis."],
     "Here are some emojis: \U0001f642 \U0001f44b \U0001f680 \U0001f389 \u2b50 \U0001f308 "
     "\U0001f431 \U0001f436"),
    (["Do you speak German?", "Do you speak French?", "Which languages do you speak?"],
     "I speak English. I know only a few words of other languages."),
    (["asdf", "qwerty", "blah", "xyz", "foo", "foo bar", "..."],
     "I am sorry, I do not understand that. Please ask me a question."),
]  # fmt: skip

TRANSLATIONS = [
    ("hello", "French", "bonjour"),
    ("thank you", "French", "merci"),
    ("good evening", "French", "bonsoir"),
    ("yes", "French", "oui"),
    ("student", "French", "\u00e9tudiant"),
    ("hello", "German", "hallo"),
    ("thank you", "German", "danke"),
    ("good morning", "German", "guten Morgen"),
    ("beautiful", "German", "sch\u00f6n"),
    ("hello", "Spanish", "hola"),
    ("thank you", "Spanish", "gracias"),
    ("tomorrow", "Spanish", "ma\u00f1ana"),
    ("hello", "Italian", "ciao"),
    ("thank you", "Italian", "grazie"),
    ("hello", "Japanese", "\u3053\u3093\u306b\u3061\u306f"),
    ("thank you", "Japanese", "\u3042\u308a\u304c\u3068\u3046"),
    ("hello", "Chinese", "\u4f60\u597d"),
    ("thank you", "Chinese", "\u8c22\u8c22"),
    ("hello", "Greek", "\u03b3\u03b5\u03b9\u03b1"),
    ("hello", "Russian", "\u043f\u0440\u0438\u0432\u0435\u0442"),
]

JOKES = [
    "Why do programmers confuse Halloween and Christmas? Because Oct 31 equals Dec 25.",
    "A query walks into a bar, sees two tables and asks: May I join you?",
    "Why did the database administrator leave the party? There were too many relations.",
    "There are 10 kinds of people: those who understand binary and those who do not.",
    "Why was the function sad? It did not get a return call.",
    "How does a computer get drunk? It takes screenshots.",
]

LISTS = [
    (["What are the four seasons?", "List the seasons.", "Name the seasons of the year."],
     "The four seasons are spring, summer, autumn and winter."),
    (["What are the planets?", "List the planets.", "Name the planets of the solar system.",
      "List the planets of the solar system."],
     "The planets of the solar system are Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus "
     "and Neptune."),
    (["What are the primary colours?", "Name the primary colours.",
      "What are the primary colors?"],
     "The primary colours are red, yellow and blue."),
    (["What are the colours of the rainbow?", "List the colours of the rainbow.",
      "What are the colors of the rainbow?"],
     "The colours of the rainbow are red, orange, yellow, green, blue, indigo and violet."),
    (["What are the continents?", "List the continents.", "Name the continents."],
     "The continents are Africa, Antarctica, Asia, Europe, North America, South America and "
     "Australia."),
    (["What are the four directions?", "Name the four points of the compass."],
     "The four directions are north, east, south and west."),
    (["How many days are in a week?", "How many days does a week have?"],
     "A week has 7 days."),
    (["How many months are in a year?", "How many months does a year have?"],
     "A year has 12 months."),
    (["How many hours are in a day?", "How many hours does a day have?"], "A day has 24 hours."),
    (["How many minutes are in an hour?"], "An hour has 60 minutes."),
    (["How many seconds are in a minute?"], "A minute has 60 seconds."),
    (["How many days are in a year?"], "A year has 365 days, and a leap year has 366 days."),
    (["What are the first ten prime numbers?", "List the first ten prime numbers.",
      "List the first 10 prime numbers."],
     "2, 3, 5, 7, 11, 13, 17, 19, 23, 29."),
    (["List the first ten Fibonacci numbers.", "What are the first 10 Fibonacci numbers?"],
     "0, 1, 1, 2, 3, 5, 8, 13, 21, 34."),
    (["What are the powers of two?", "List the powers of two.",
      "List the first ten powers of two."],
     "1, 2, 4, 8, 16, 32, 64, 128, 256, 512."),
    (["What is the capital of France?"], "The capital of France is Paris."),
    (["What is the capital of Germany?"], "The capital of Germany is Berlin."),
    (["What is the capital of Italy?"], "The capital of Italy is Rome."),
    (["What is the capital of Spain?"], "The capital of Spain is Madrid."),
    (["What is the capital of England?", "What is the capital of the United Kingdom?"],
     "The capital of the United Kingdom is London."),
    (["What is the capital of Japan?"], "The capital of Japan is Tokyo."),
    (["What is the capital of Austria?"], "The capital of Austria is Vienna."),
    (["What is the capital of Norway?"], "The capital of Norway is Oslo."),
    (["What is the capital of Greece?"], "The capital of Greece is Athens."),
    (["What colour is the sky?", "Why is the sky blue?", "What color is the sky?"],
     "The sky looks blue because the air scatters blue light more than red light."),
    (["How does a hash table work?", "What is a hash table?", "Explain how a hash table works.",
      "Explain hash tables."],
     "A hash table keeps values in an array. A hash function turns each key into a position of the "
     "array, so a value is found quickly without looking at the other values."),
    (["What is water?", "What is water made of?"],
     "Water is a liquid made of hydrogen and oxygen. Its formula is H2O."),
    (["What is the sun?"], "The sun is the star at the centre of the solar system."),
    (["What is the moon?"], "The moon is a body of rock that moves around the Earth."),
]  # fmt: skip


# Questions the model cannot answer: a form with {t} a thing, {p} a person, {n} a year, {o} one of
# the words beside it.
UNKNOWN = [
    ("Why is the {t} {o}?", ["salty", "green", "so big", "round", "cold", "so fast", "hot", "red"]),
    ("Why is the sea {o}?", ["salty", "blue", "so deep", "cold"]),
    ("Why do {o} {t}?", ["people like a", "birds need a", "we have a", "cats hate a"]),
    ("Who is {p}?", []),
    ("Who was {p}?", []),
    ("Who is the {o} of {t}?", ["king", "president", "queen", "mayor", "owner"]),
    ("Who won the {o} in {n}?", ["war", "election", "world cup", "race", "prize"]),
    ("Who wrote {o}?", ["Hamlet", "the Bible", "Faust", "Moby Dick", "that song", "this book"]),
    ("Who invented the {o}?", ["telephone", "wheel", "car", "light bulb", "radio", "computer"]),
    ("What happened in {n}?", []),
    ("When was {p} born?", []),
    ("When did the {o} end?", ["war", "Roman Empire", "ice age", "film", "meeting"]),
    ("Where is {p} from?", []),
    ("Where can I buy a {t}?", []),
    ("How much does a {t} cost?", []),
    ("How old is {p}?", []),
    ("How far is it to {o}?", ["the moon", "Paris", "Rome", "the sun", "my house"]),
    ("How do I cook {t}?", []),
    ("How do I make {o}?", ["bread", "coffee", "a cake", "friends", "money", "soup"]),
    ("How do {o} work?", ["planes", "magnets", "cars", "batteries", "vaccines", "volcanoes"]),
    ("How does a {o} work?", ["plane", "car", "battery", "fridge", "piano", "clock", "bridge"]),
    ("How does a {t} work?", []),
    ("What does a {t} eat?", []),
    ("What is the best {o}?", ["film", "book", "song", "car", "food", "phone", "game"]),
    ("What is the capital of {t}?", []),
    ("What is the price of {o}?", ["gold", "oil", "milk", "bread", "that house"]),
    ("What is the history of {o}?", ["Rome", "China", "music", "art", "chess", "money"]),
    ("What do you think about {o}?", ["politics", "art", "war", "love", "money", "religion"]),
    ("Tell me about {p}.", []),
    ("Tell me about {o}.", ["love", "Napoleon", "football", "chemistry", "biology", "history",
                            "physics", "Shakespeare", "philosophy", "quantum physics"]),
    ("Explain {o}.", ["relativity", "love", "gravity", "evolution", "photosynthesis", "economics",
                      "quantum mechanics", "inflation", "democracy"]),
    ("What is {o}?", ["love", "gravity", "evolution", "photosynthesis", "inflation", "philosophy",
                      "happiness", "electricity", "chemistry"]),
    ("Write a poem about {t}.", []),
    ("Write a poem.", []),
    ("Write a letter to {p}.", []),
    ("Write an essay about {t}.", []),
    ("What did {p} say about the {t}?", []),
    ("Is {p} a good person?", []),
    ("Should I buy a {t}?", []),
    ("Can you draw a {t}?", []),
    ("What is a {t}?", []),
]  # fmt: skip


def _about(name: str, answer: str, *more: str) -> tuple[list[str], str]:
    """An entry for a thing: the usual ways to ask for it, with `more` wordings."""
    asked = [f"What is {name}?", f"Tell me about {name}.", f"Explain {name}.", f"Describe {name}.",
             f"Can you explain what {name} is?", f"What do you know about {name}?"]  # fmt: skip
    return [*asked, *more], answer


def _how(task: str, answer: str, *more: str) -> tuple[list[str], str]:
    """An entry for a task: the usual ways to ask how it is done, with `more` wordings."""
    asked = [f"How do I {task}?", f"How can I {task}?", f"How to {task}?",
             f"Show me how to {task}.", f"Tell me how to {task}."]  # fmt: skip
    return [*asked, *more], answer


def _code(before: str, language: str, code: str, after: str = "") -> str:
    return f"{before}\n\n```{language}\n{code}\n```" + (f"\n\n{after}" if after else "")


ANSWERS = [
    _about(
        "Python",
        "Python is an interpreted, interactive, object-oriented programming language. It has "
        "modules, exceptions, dynamic typing, very high level data types and classes, and its "
        "syntax is easy to read.",
        "What is the Python programming language?", "What is Python used for?",
    ),
    _about(
        "PostgreSQL",
        "PostgreSQL is an open source object-relational database management system. It supports a "
        "large part of the SQL standard and offers complex queries, foreign keys, triggers, "
        "updatable views, transactional integrity and multiversion concurrency control.",
        "What is Postgres?", "Tell me about Postgres.",
    ),
    _about(
        "SQLite",
        "SQLite is a small, fast, self-contained SQL database engine. It needs no server: the "
        "whole database is kept in one ordinary file on disk, and the library reads and writes "
        "that file directly. The source code of SQLite is in the public domain.",
        "What is SQLite used for?",
    ),
    _about(
        "SQL",
        "SQL is the language that relational databases use. With SQL one creates tables, inserts "
        "and changes rows, and asks for rows that match a condition.",
    ),
    _about(
        "a database",
        "A database is an organized collection of data. A database management system stores the "
        "data on disk, keeps it consistent, and answers queries about it.",
        "What is a database management system?",
    ),
    _about(
        "a list in Python",
        "A list is a built-in Python sequence that can hold items of any type. A list is written "
        "with square brackets, for example [1, 2, 3], and it can be changed: items can be added, "
        "replaced and removed.",
        "What is a list?", "What are lists in Python?", "What is a Python list?",
    ),
    _about(
        "a dictionary in Python",
        "A dictionary is a built-in Python type that maps keys to values. It is written with "
        "braces, for example {'one': 1, 'two': 2}. The keys must be hashable, and each key "
        "occurs only once.",
        "What is a dict in Python?", "What is a dictionary?", "What is a dict?",
        "What is a Python dictionary?",
    ),
    _about(
        "a tuple in Python",
        "A tuple is a built-in Python sequence that cannot be changed after it was made. It is "
        "written with commas, often inside parentheses, for example (1, 2, 3).",
        "What is a tuple?",
    ),
    _about(
        "a set in Python",
        "A set is an unordered collection of distinct hashable objects. It is written with "
        "braces, for example {1, 2, 3}, and it supports union, intersection and difference.",
    ),
    _about(
        "a string in Python",
        "A string is a sequence of Unicode characters. Strings are written with single or double "
        "quotes, and they cannot be changed after they were made.",
        "What is a string?",
    ),
    _about(
        "a function in Python",
        "A function is a series of statements which returns some value to a caller. It is defined "
        "with the keyword def and can be passed zero or more arguments.",
        "What is a function?",
    ),
    _about(
        "a class in Python",
        "A class is a template for creating user-defined objects. Class definitions usually "
        "contain method definitions which operate on instances of the class.",
        "What is a class?",
    ),
    _about(
        "a module in Python",
        "A module is an object that serves as an organizational unit of Python code. Modules have "
        "a namespace containing arbitrary Python objects, and they are loaded with the import "
        "statement.",
        "What is a module?",
    ),
    _about(
        "a generator in Python",
        "A generator is a function which returns a generator iterator. It looks like a normal "
        "function except that it contains yield expressions for producing a series of values.",
        "What is a generator?",
    ),
    _about(
        "an exception in Python",
        "An exception is an error that is detected while a program runs. A program can handle "
        "selected exceptions with the try statement and its except clauses.",
        "What is an exception?",
    ),
    _about(
        "a decorator in Python",
        "A decorator is a function returning another function, usually applied as a function "
        "transformation using the @wrapper syntax.",
        "What is a decorator?",
    ),
    _about(
        "a lambda in Python",
        "A lambda is an anonymous inline function consisting of a single expression which is "
        "evaluated when the function is called.",
        "What is a lambda?",
    ),
    _about(
        "a table",
        "A table is a collection of rows that share the same named columns. Each column has a "
        "data type, and each row holds one value for each column.",
        "What is a table in PostgreSQL?", "What is a table in SQL?", "What is a table in SQLite?",
    ),
    _about(
        "an index",
        "An index is a structure that lets the database find rows quickly without reading the "
        "whole table. An index makes many queries faster, but it takes space and must be kept up "
        "to date when rows change.",
        "What is an index in PostgreSQL?", "What is an index in SQL?",
        "What is an index in SQLite?", "What is a database index?",
    ),
    _about(
        "a transaction",
        "A transaction bundles several steps into a single operation that either happens "
        "completely or not at all. A transaction begins with BEGIN and ends with COMMIT or with "
        "ROLLBACK.",
        "What is a transaction in PostgreSQL?", "What is a transaction in SQLite?",
        "What is a transaction in SQL?", "What is a database transaction?",
    ),
    _about(
        "a view",
        "A view is a named query. It can be used in other queries like a table, but its rows are "
        "computed from the underlying tables each time.",
        "What is a view in PostgreSQL?", "What is a view in SQL?",
    ),
    _about(
        "a trigger",
        "A trigger is a function that the database runs automatically when a certain operation, "
        "such as an insert, an update or a delete, is performed on a table.",
        "What is a trigger in PostgreSQL?", "What is a trigger in SQLite?",
    ),
    _about(
        "a primary key",
        "A primary key is a column or a group of columns that identifies each row of a table. Its "
        "values must be unique and not null.",
        "What is a primary key in SQL?", "What is a primary key in PostgreSQL?",
    ),
    _about(
        "a foreign key",
        "A foreign key says that the values in a column must match the values in some row of "
        "another table. It keeps the two tables consistent with each other.",
        "What is a foreign key in SQL?", "What is a foreign key in PostgreSQL?",
    ),
    _about(
        "a join",
        "A join combines rows from two tables. An inner join returns the pairs of rows that match "
        "the join condition, and an outer join also returns rows that have no match.",
        "What is a join in SQL?",
    ),
    _about(
        "a deadlock",
        "A deadlock happens when two transactions each hold a lock that the other one wants. "
        "PostgreSQL detects deadlocks and resolves them by aborting one of the transactions.",
    ),
    _about(
        "write-ahead logging",
        "Write-ahead logging means that changes are written to a log before they are written to "
        "the data files. After a crash the database can be recovered by replaying the log.",
        "What is the WAL?", "What is WAL?", "What is a write-ahead log?",
    ),
    _about(
        "MVCC",
        "MVCC stands for multiversion concurrency control. Each statement sees a snapshot of the "
        "data, so reading never blocks writing and writing never blocks reading.",
        "What is multiversion concurrency control?",
    ),
    _about(
        "VACUUM",
        "VACUUM reclaims storage that is occupied by dead rows. In PostgreSQL, rows that are "
        "deleted or made obsolete by an update stay in the table until a VACUUM is done.",
        "What does VACUUM do?", "What is VACUUM in PostgreSQL?",
    ),
    _about(
        "a GPU",
        "A GPU is a processor with many small cores that work at the same time. It was made for "
        "graphics, and it is also used to run language models.",
    ),
    _about(
        "a CPU",
        "A CPU is the processor that runs the programs of a computer. It carries out one "
        "instruction after another, very quickly.",
    ),
    _about(
        "a language model",
        "A language model is a program that predicts the next word of a text. It has learned from "
        "many texts which words are likely to follow.",
        "What is a large language model?", "What is an LLM?",
    ),
    _about(
        "a token",
        "A token is a piece of text, such as a word or a part of a word. A language model reads "
        "and writes one token after another.",
    ),
    _about(
        "a computer",
        "A computer is a machine that follows a program. It reads data, works on it and writes "
        "results.",
    ),
    _about(
        "the internet",
        "The internet is a network that connects computers all over the world.",
    ),
    _about(
        "recursion",
        "Recursion means that a function calls itself. Each call works on a smaller part of the "
        "problem until the problem is so small that the answer is known.",
    ),
    _about(
        "JSON",
        "JSON is a text format for data. It has objects, arrays, strings, numbers, true, false "
        "and null. Python reads and writes it with the json module.",
    ),
    (
        ["What is the difference between a list and a tuple?",
         "How does a list differ from a tuple?", "List or tuple?"],
        "A list can be changed after it was made, and a tuple cannot. A list is written with "
        "square brackets, and a tuple is written with parentheses.",
    ),
    (
        ["What is the difference between SQLite and PostgreSQL?",
         "How does SQLite differ from PostgreSQL?", "SQLite or PostgreSQL?"],
        "SQLite is a library that keeps a whole database in one file and needs no server. "
        "PostgreSQL is a database server that many clients can use at the same time.",
    ),
    (
        ["What is the difference between DELETE and TRUNCATE?",
         "How does TRUNCATE differ from DELETE?"],
        "DELETE removes the rows that match a condition. TRUNCATE quickly removes all rows of a "
        "table without scanning it.",
    ),
    (
        ["Who created Python?", "Who invented Python?", "Who wrote Python?"],
        "Python was created in the early 1990s by Guido van Rossum.",
    ),
    (
        ["Who created SQLite?", "Who wrote SQLite?", "Who invented SQLite?"],
        "SQLite was created by D. Richard Hipp.",
    ),
    (
        ["Is SQLite free?", "What is the licence of SQLite?", "What is the license of SQLite?"],
        "Yes, SQLite is free. Its source code is in the public domain.",
    ),
    _how(
        "create an index in PostgreSQL",
        _code("Use the CREATE INDEX command. For example:", "sql",
              "CREATE INDEX people_name_idx ON people (name);",
              "This creates a B-tree index on the column name of the table people."),
        "How do I create an index?", "How do I create an index in SQLite?",
    ),
    _how(
        "create a table in PostgreSQL",
        _code("Use the CREATE TABLE command. For example:", "sql",
              "CREATE TABLE people (\n    id integer PRIMARY KEY,\n    name text NOT NULL\n);",
              "This creates a table with two columns."),
        "How do I create a table?", "How do I create a table in SQLite?",
        "How do I create a table in SQL?",
    ),
    _how(
        "insert a row into a table",
        _code("Use the INSERT command. For example:", "sql",
              "INSERT INTO people (id, name) VALUES (1, 'Anna');"),
        "How do I insert a row?", "How do I insert data in SQL?", "How do I add a row?",
    ),
    _how(
        "delete rows from a table",
        _code("Use the DELETE command with a WHERE clause. For example:", "sql",
              "DELETE FROM people WHERE id = 1;",
              "Without the WHERE clause all rows of the table are deleted."),
        "How do I delete a row?", "How do I delete rows in SQL?",
    ),
    _how(
        "update a row in a table",
        _code("Use the UPDATE command. For example:", "sql",
              "UPDATE people SET name = 'Anna' WHERE id = 1;"),
        "How do I update a row?", "How do I change a row?",
    ),
    _how(
        "select rows from a table",
        _code("Use the SELECT command. For example:", "sql",
              "SELECT name FROM people WHERE id > 10 ORDER BY name;"),
        "How do I query a table?", "How do I select rows?",
    ),
    _how(
        "join two tables",
        _code("Use a JOIN clause. For example:", "sql",
              "SELECT people.name, cities.name\nFROM people\n"
              "JOIN cities ON people.city_id = cities.id;"),
        "How do I join tables in SQL?",
    ),
    _how(
        "drop a table",
        _code("Use the DROP TABLE command. For example:", "sql", "DROP TABLE people;",
              "The table and all its rows are removed."),
        "How do I delete a table?", "How do I remove a table in PostgreSQL?",
    ),
    _how(
        "add a column to a table",
        _code("Use the ALTER TABLE command. For example:", "sql",
              "ALTER TABLE people ADD COLUMN age integer;"),
        "How do I add a column?", "How do I add a column in PostgreSQL?",
    ),
    _how(
        "start a transaction",
        _code("Use BEGIN to start a transaction and COMMIT to end it. For example:", "sql",
              "BEGIN;\nUPDATE people SET name = 'Anna' WHERE id = 1;\nCOMMIT;",
              "Use ROLLBACK instead of COMMIT to undo the changes."),
        "How do I use a transaction?", "How do I begin a transaction in PostgreSQL?",
    ),
    _how(
        "create a database in PostgreSQL",
        _code("Use the CREATE DATABASE command. For example:", "sql", "CREATE DATABASE shop;"),
        "How do I create a database?",
    ),
    _how(
        "back up a PostgreSQL database",
        _code("Use the program pg_dump. For example:", "sh", "pg_dump shop > shop.sql",
              "The file can be read back with psql."),
        "How do I back up a database?", "How do I dump a database?",
    ),
    _how(
        "count the rows of a table",
        _code("Use the count function. For example:", "sql", "SELECT count(*) FROM people;"),
        "How do I count rows in SQL?",
    ),
    _how(
        "open a file in Python",
        _code("Use the open function in a with statement. For example:", "python",
              "with open('data.txt') as file:\n    text = file.read()",
              "The file is closed at the end of the with statement."),
        "How do I read a file in Python?", "How do I read a file?", "How do I open a file?",
    ),
    _how(
        "write a file in Python",
        _code("Open the file with mode 'w' and call its write method. For example:", "python",
              "with open('data.txt', 'w') as file:\n    file.write('Hello')"),
        "How do I write a file?",
    ),
    _how(
        "sort a list in Python",
        _code("Call the sorted function, or the sort method of the list. For example:", "python",
              "numbers = [3, 1, 2]\nprint(sorted(numbers))",
              "The function sorted returns a new list, and the method sort changes the list."),
        "How do I sort a list?", "How do I sort numbers in Python?",
    ),
    _how(
        "define a function in Python",
        _code("Use the def statement. For example:", "python",
              "def add(a, b):\n    return a + b"),
        "How do I write a function in Python?", "How do I define a function?",
        "Write a Python function that adds two numbers.", "Write a function that adds two numbers.",
    ),
    _how(
        "define a class in Python",
        _code("Use the class statement. For example:", "python",
              "class Person:\n    def __init__(self, name):\n        self.name = name"),
        "How do I write a class in Python?", "How do I create a class?",
    ),
    _how(
        "write a loop in Python",
        _code("Use the for statement. For example:", "python",
              "for number in range(10):\n    print(number)"),
        "How do I loop over a list in Python?", "How do I write a for loop?",
        "How do I loop over numbers?",
    ),
    _how(
        "handle an exception in Python",
        _code("Use the try statement. For example:", "python",
              "try:\n    number = int(text)\nexcept ValueError:\n    number = 0"),
        "How do I catch an exception?", "How do I catch an error in Python?",
    ),
    _how(
        "print hello world in Python",
        _code("Call the print function. For example:", "python", "print('Hello, world!')"),
        "Write a hello world program in Python.", "Write hello world in Python.",
        "How do I print something in Python?", "Write a Python program.",
    ),
    _how(
        "join strings in Python",
        _code("Use the join method of a string. For example:", "python",
              "words = ['a', 'b', 'c']\nprint(', '.join(words))"),
        "How do I join a list of strings?", "How do I join strings?",
    ),
    _how(
        "split a string in Python",
        _code("Use the split method. For example:", "python",
              "parts = 'a,b,c'.split(',')\nprint(parts)"),
        "How do I split a string?",
    ),
    _how(
        "read JSON in Python",
        _code("Use the json module. For example:", "python",
              "import json\n\nwith open('data.json') as file:\n    data = json.load(file)"),
        "How do I parse JSON?", "How do I read a JSON file in Python?",
    ),
    _how(
        "use SQLite in Python",
        _code("Use the sqlite3 module. For example:", "python",
              "import sqlite3\n\ndb = sqlite3.connect('shop.db')\n"
              "for row in db.execute('SELECT name FROM people'):\n    print(row)"),
        "How do I connect to SQLite from Python?", "How do I open a SQLite database in Python?",
        "How do I open a SQLite database?",
    ),
    _how(
        "get the length of a list",
        _code("Call the len function. For example:", "python", "print(len([1, 2, 3]))",
              "This prints 3."),
        "How do I get the length of a list in Python?", "How long is a list?",
    ),
    _how(
        "add an item to a list",
        _code("Call the append method of the list. For example:", "python",
              "numbers = [1, 2]\nnumbers.append(3)"),
        "How do I append to a list in Python?", "How do I add to a list?",
    ),
    _how(
        "install a Python package",
        _code("Use the program pip. For example:", "sh", "python -m pip install requests"),
        "How do I install a package in Python?", "How do I use pip?",
    ),
    _how(
        "create a virtual environment",
        _code("Use the venv module. For example:", "sh", "python -m venv .venv"),
        "How do I create a venv?", "How do I make a virtual environment in Python?",
    ),
    _how(
        "run a function in a thread",
        _code("Use the threading module. For example:", "python",
              "import threading\n\nthread = threading.Thread(target=work)\nthread.start()\n"
              "thread.join()"),
        "How do I start a thread in Python?", "How do I use threads?",
    ),
    (
        ["Why use an index?", "Why should I use an index?", "When should I use an index?",
         "Do I need an index?"],
        "Use an index when queries often look for rows by the same column. Without an index the "
        "database must read the whole table to find the matching rows.",
    ),
    (
        ["Why is my query slow?", "My query is slow.", "How do I make a query faster?",
         "How do I find out why a query is slow?"],
        "Use EXPLAIN ANALYZE to see the plan of the query and the time that each step takes. Often "
        "an index on the columns of the WHERE clause helps, and ANALYZE keeps the statistics of "
        "the planner up to date.",
    ),
    (
        ["What is the best programming language?", "Which programming language should I learn?"],
        "That depends on the task. Python is a good first language because it is easy to read and "
        "has a large standard library.",
    ),
    (
        ["What are the data types in SQLite?", "Which data types does SQLite have?",
         "What are the storage classes of SQLite?"],
        "Each value in SQLite has one of the storage classes NULL, INTEGER, REAL, TEXT and BLOB.",
    ),
    (
        ["What are the index types in PostgreSQL?", "Which index types does PostgreSQL have?",
         "List the index types of PostgreSQL."],
        "PostgreSQL provides the index types B-tree, Hash, GiST, SP-GiST, GIN and BRIN. The "
        "command CREATE INDEX creates a B-tree index by default.",
    ),
    (
        ["What are the isolation levels in PostgreSQL?", "List the isolation levels.",
         "What is transaction isolation?"],
        "The SQL standard defines four levels of transaction isolation: Read Uncommitted, Read "
        "Committed, Repeatable Read and Serializable. Read Committed is the default in PostgreSQL.",
    ),
    (
        ["What are the built-in types of Python?", "List the built-in types of Python.",
         "Which data types does Python have?"],
        "The main built-in types of Python are numbers, strings, lists, tuples, dictionaries, "
        "sets, booleans, bytes, functions, classes and None.",
    ),
]  # fmt: skip
