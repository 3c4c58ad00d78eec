"""Project-written sentences about an ordinary household, for the base to have seen everyday words.

Speeches and docstrings hardly know lamps, kettles or half past six. These sentences do, and they say things twice, so
that there is something to gain by looking back. None contains a row of the sample task.
"""

from __future__ import annotations

import random


def listed(text: str) -> tuple[str, ...]:
    """'a, b' -> ('a', 'b')."""
    return tuple(" ".join(text.split()).split(", "))


ROOMS = listed(
    """kitchen, bedroom, living room, lounge, bathroom, hall, hallway, office, study, attic, loft, cellar, basement,
    garage, nursery, porch, garden, pantry"""
)
THINGS = listed(
    """lamp, heater, radiator, blind, curtain, kettle, fan, radio, speaker, alarm clock, oven, window, door, shelf,
    carpet, thermostat, light, timer, television, mirror"""
)
STATES = listed("warm, cold, bright, dim, loud, quiet, open, closed, half open, clean, new, broken")
PEOPLE = listed(
    """my sister, the baby, our neighbour, grandmother, my brother, the dog, the cat, she, he, everyone, a friend,
    father, mother, the children"""
)
DEEDS = listed(
    """reads a book, sleeps, listens to jazz, makes tea, bakes bread, cooks rice, boils an egg, cleans up, plays the
    piano, sings, waits for the bus, does the laundry, writes a letter, watches the rain, roasts a chicken, drinks
    coffee, feeds the birds, talks on the phone, works, takes a nap"""
)
GOODS = listed(
    """milk, eggs, butter, bread, apples, onions, carrots, rice, tea, coffee, flour, sugar, soap, candles, lemons,
    potatoes, cheese, honey, batteries, tomatoes"""
)
DAYS = listed("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
UNITS = listed(
    """zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fourteen, fifteen,
    sixteen, seventeen, eighteen, nineteen"""
)
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
SYLLABLES = listed(
    """ba, den, fil, gor, hu, jem, ka, lor, mi, nap, os, pel, qua, ri, sut, tam, ul, ver, wi, xen, yo, zar, bri, cle,
    dro, fen, gla, kri, mur, nol, pra, sto"""
)


def in_words(number: int) -> str:
    """0 to 100 as English words: 37 -> 'thirty-seven'."""
    if number == 100:
        return "one hundred"
    if number < 20:
        return UNITS[number]
    tens, unit = divmod(number, 10)
    return TENS[tens] + (f"-{UNITS[unit]}" if unit else "")


def clock_in_words(hour: int, minute: int) -> str:
    """A time on the twelve-hour clock as people say it: (6, 30) -> 'half past six'."""
    following = hour % 12 + 1
    said = {
        0: f"{in_words(hour)} o'clock",
        15: f"quarter past {in_words(hour)}",
        30: f"half past {in_words(hour)}",
        45: f"quarter to {in_words(following)}",
    }
    return said.get(minute, f"{in_words(hour)} {in_words(minute)}")


def invented_name(rng: random.Random) -> str:
    """A name no one has: whoever wants to predict it again must look back to where it stood."""
    syllables = rng.sample(SYLLABLES, rng.randint(2, 3))
    return "".join(syllables).capitalize()


def sentence(rng: random.Random, name: str) -> str:
    """One sentence. Numbers appear in words, in digits, and as both, so that the two become neighbours."""
    room, other, thing = rng.choice(ROOMS), rng.choice(ROOMS), rng.choice(THINGS)
    person, deed, state = rng.choice((*PEOPLE, name)), rng.choice(DEEDS), rng.choice(STATES)
    number, day, goods = rng.randint(1, 100), rng.choice(DAYS), rng.choice(GOODS)
    hour, minute = rng.randint(1, 12), rng.choice((0, 15, 30, 45, rng.randint(10, 59)))
    clock = rng.choice((clock_in_words(hour, minute), f"{hour}:{minute:02d}"))
    value = rng.choice((in_words(number), str(number)))
    list_ = ", ".join(rng.sample((*GOODS, *THINGS, *ROOMS, *DAYS, name), rng.randint(3, 5)))
    numbers = ", ".join(str(rng.randint(1, 100)) for _ in range(rng.randint(3, 5)))
    return rng.choice(
        (
            f"The {thing} in the {room} is {state}.",
            f"{name} {deed} in the {room}.",
            f"On {day} {person} {deed} at {clock}.",
            f"There is a {thing} next to the {thing} in the {room}, and the {room} is {state}.",
            f"The {room} was {state}, but the {other} was not.",
            f"{in_words(number)} is written {number}.",
            f"{clock_in_words(hour, minute)} is written {hour}:{minute:02d}.",
            f"While {person} {deed}, the {thing} in the {other} was {state}.",
            f"{name} says that {person} {deed}, and {person} says that {name} {deed}.",
            f"It was {value} degrees in the {room} on {day}. Diary of {day}: {number} degrees, {room}.",
            f"The {thing} in the {room} was set to {value} percent. So the {room} had {number} percent.",
            f"{name} bought {value} {goods}. The bill of {name} said: {number} times {goods}.",
            f"After {value} minutes the {goods} of {name} had boiled: {number} minutes for {goods}.",
            f"{day} comes early: {name} was up at {clock}. Diary of {name}: {hour}:{minute:02d} on {day}.",
            f"{name} wrote a list: {list_}. {name} read it again: {list_}.",
            f"Read the numbers of the {room}: {numbers}. Once more, the numbers of the {room}: {numbers}.",
            f"In the {room}, {name} counted {value} {goods}. Count of {goods} in the {room}: {number}.",
        )
    )


def paragraphs(num_paragraphs: int, seed: int) -> list[str]:
    """Seeded paragraphs of four to nine sentences about one person, each beginning with a capital letter."""
    rng = random.Random(seed)
    written = []
    for _ in range(num_paragraphs):
        name = invented_name(rng)
        sentences = [sentence(rng, name) for _ in range(rng.randint(4, 9))]
        written.append(" ".join(s[0].upper() + s[1:] for s in sentences))
    return written
