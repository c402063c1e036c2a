"""Questions spark cannot answer, and what it says then; and names, which it can repeat.

A wide grammar of everyday questions teaches the small model to decline instead of inventing.
"""

import random

from spark_grammar import expand

ANSWERS = (
    "I don't know that. I am a demonstration of 5 million parameters and only know qrun. Try a larger model: `qrun "
    "chat ernie --wint4`.",
    "That is beyond me, with my 5 million parameters. I only know qrun. A larger model may know: `qrun chat ernie "
    "--wint4`.",
)
_PLACE = (
    "{france|germany|spain|italy|japan|china|india|brazil|peru|kenya|egypt|norway|sweden|canada|mexico|chile|poland|"
    "greece|turkey|iran|"
    "cuba|nepal|ghana|russia|england|scotland|portugal|austria|australia|paris|london|berlin|rome|tokyo|beijing|"
    "madrid|oslo|new york|"
    "texas|california|africa|europe|asia|the moon|mars}"
)
_THING = (
    "{love|cats|dogs|the sea|spring|autumn|winter|the sun|a tree|a river|a dragon|a knight|a robot|bread|coffee|tea|"
    "pizza|music|football|"
    "chess|history|a mountain|birds|the stars|rain|snow|my mother|a friend|friendship|time|war|peace|money|school|a "
    "horse|a garden|cheese|"
    "flowers|the ocean|space|dinosaurs|a car|a bike|trains|the universe|happiness}"
)
_SCIENCE = (
    "{gravity|photosynthesis|evolution|black holes|relativity|an atom|a molecule|dna|electricity|magnetism|light|"
    "sound|inflation|democracy|"
    "the brain|the heart|a volcano|an earthquake|oxygen|water|iron|gold|a virus|bacteria|algebra|calculus|a prime "
    "number|pi|philosophy|"
    "economics|quantum mechanics|the big bang|climate change|an eclipse|a star|a planet|jupiter|a recursion|sorting|"
    "a database|javascript|"
    "python decorators|a linked list|html|docker|kubernetes|git|linux|excel|photoshop|bitcoin|blockchain|yoga|"
    "meditation|a sonnet|jazz}"
)
_WHO = (
    "{hamlet|the odyssey|faust|don quixote|war and peace|the mona lisa|the telephone|the light bulb|the radio|"
    "america|penicillin|"
    "the president|the king|the queen|the pope|napoleon|einstein|newton|mozart|beethoven|shakespeare|plato|the best "
    "player|gandhi|curie}"
)
_DISH = (
    "{soup|rice|pasta|a cake|bread|pizza|an omelette|pancakes|a salad|"
    "curry|dumplings|fish|chicken|potatoes|eggs|beans|a pie|noodles|tea}"
)
_ACT = (
    "{ride a bike|swim|play chess|play guitar|learn french|lose weight|sleep better|make friends|fix my car|paint a "
    "wall|tie a tie|write a book|"
    "find a job|save money|get rich|grow tomatoes|train my dog|build a house|learn math|cook dinner|clean my windows|"
    "write a letter|draw a cat|"
    "sort a list in python|write a loop in java|make a website|install windows|reset my phone|print a page|bake "
    "bread|knit a scarf|sing}"
)
_ASKS = (
    f"what is the {{capital|population|language|currency|flag|area|president|king|history|food|climate}} of {_PLACE}",
    f"where is {_PLACE}", f"how {{far|big|old|cold|hot}} is {_PLACE}",
    f"{{what's|what is|how is}} the weather {{in|like in}} {_PLACE}{{| today| tomorrow}}",
    f"who {{wrote|made|invented|discovered|painted|was|is|knows|killed|likes}} {_WHO}", f"when was {_WHO} born",
    f"tell me about {_WHO}",
    f"{{write|make|compose|give me}} {{me |}}{{a poem|a story|a song|an essay|a haiku|a speech|a rhyme|a paragraph}} "
    f"about {_THING}",
    f"tell me {{a story|something|a fact|everything}} about {_THING}",
    f"{{do you like|what do you think of|what do you think about}} {_THING}",
    f"{{what is|explain|how does|describe|define|what's|tell me about}} {_SCIENCE}{{| work| to me| in simple words}}",
    f"why is {_SCIENCE} important",
    f"how {{do i|to|can i|do you}} {{cook|make|prepare}} {_DISH}", f"{{recipe|a recipe}} for {_DISH}",
    f"how {{do i|to|can i|long does it take to}} {_ACT}",
    f"can you {{teach me to|help me|show me how to}} {_ACT}", f"i want to {_ACT}",
    f"translate {_THING} {{to|into}} {{french|german|spanish|chinese|latin|japanese}}",
    f"how do you say {_THING} in {{french|german|spanish|chinese|latin}}",
    "who {won|will win|is winning} the {world cup|election|game|match|race|war|super bowl|olympics|lottery}{| last "
    "year| in 1998| in 2010| today}",
    "why is the {sky|sea|grass|moon|sun|night|fire} {blue|green|white|yellow|dark|hot|cold}",
    "how {old|tall|heavy|rich|fast} is {my dog|the tallest man|a lion|a whale|an elephant|the earth|the sun|a mouse|"
    "light}",
    "what is the {meaning of life|best movie|best book|news|news today|stock price|largest animal|fastest car|"
    "tallest mountain|longest river|square root of two|speed of light|best phone|best laptop}",
    f"is {_THING} {{good|bad|dangerous|expensive|real|healthy|alive}}", f"where can i buy {_THING}",
    f"what {{colour|color}} is {_THING}", f"how many {{people|dogs|rivers|cities|birds}} are in {_PLACE}",
    "{play|open|send|book|order|call|turn on|turn off} {some music|the window|an email|a flight|a pizza|my mother|"
    "the light|a taxi|a table|the radio}",
    "{i have a headache|what should i eat|what should i wear|should i marry|is there a god|who should i vote for|"
    "what is love|do aliens exist|will it rain|what should i cook|where should i travel|how do i get a visa}",
    "write {a function|code|a program|a script|python code|a class|a query} {that|to} {sorts a list|adds two numbers|"
    "reads a file|reverses a string|prints hello world|finds primes|draws a circle|parses json}",
)  # fmt: skip
_SYLLABLES = [
    "an", "bel", "ca", "dor", "el", "fa", "gi", "ha", "il", "jo", "ka", "lu", "mi", "na", "or", "pe", "ra",
    "sa", "ti", "vo", "wen", "ya",
    "zo", "ben", "mar", "lin", "tom", "el", "ro", "sha", "kai",
]  # fmt: skip
_NAMES = [
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack", "Kate", "Leo", "Mia",
    "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Uma", "Victor", "Wendy", "Yan", "Zoe", "Alex", "Li", "Wei",
    "Ming", "Maria", "Ivan", "John", "Mary", "Peter", "Lucy", "Omar", "Fatima", "Ravi", "Priya", "Ken", "Yuki",
    "Lars", "Nina", "Hugo", "Eva", "Adam", "Sarah", "Tom", "Lisa", "Mark", "Julia", "Max", "Sophie", "Chris",
    "Dana",
]  # fmt: skip


def off_topic(rng: random.Random) -> tuple[str, str]:
    """A question outside spark's world, declined."""
    return expand(rng, rng.choice(_ASKS)), ANSWERS[0] if rng.random() < 0.8 else ANSWERS[1]


def name(rng: random.Random, *, wild: bool = False) -> str:
    """A common or an invented first name."""
    if wild and rng.random() < 0.6:
        letters = ("bcdfghjklmnprstvz", "aeiou", ("", "", "n", "r"))
        return "".join(rng.choice(some) for some in letters * 2).capitalize()
    who = (
        rng.choice(_NAMES)
        if rng.random() < 0.5
        else "".join(rng.sample(_SYLLABLES, rng.choice((2, 2, 3)))).capitalize()
    )
    return who if rng.random() < 0.8 else who.lower()


def my_name_is(rng: random.Random, who: str) -> tuple[str, str]:
    """Someone introduces themselves."""
    ask = expand(
        rng,
        "{my name is|i am|i'm|hi, i am|hello, my name is|call me|you can call me|hi, my name is|hello, i'm|this is}",
    )
    return f"{ask} {who}", f"Nice to meet you, {who}. How can I help you with qrun?"


def what_is_my_name(rng: random.Random, who: str | None) -> tuple[str, str]:
    """Asks for the name, known or not."""
    ask = expand(
        rng,
        "{what is my name|what's my name|do you know my name|who am i|do you remember my name|say my "
        "name|tell me my name}",
    )
    return ask, f"Your name is {who}." if who else "You have not told me your name."
