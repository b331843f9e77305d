"""Names nobody has heard of, in three pools that share no word."""

import dataclasses
import functools
import random
from typing import Literal

Split = Literal["train", "validation", "evaluation"]
SPLITS: tuple[Split, ...] = ("train", "validation", "evaluation")


def _words(text: str) -> list[str]:
    return text.split()


_SHARES: dict[Split, float] = {"train": 0.6, "validation": 0.15, "evaluation": 0.25}

_HEADS = _words("""
Bar Bel Ben Bor Bran Bren Cal Cam Car Cor Cran Cul Dal Dar Del Den Dor Dun Eld Ell Fal Far Fen Fin Fol Gal Gar Gil
Glen Gor Gran Hal Ham Har Hel Hol Kel Ken Kil Kir Lan Lar Lin Lor Mal Mar Mel Mer Mil Mor Nel Nor Orm Pel Pen Per Pol
Por Ral Ran Ros Sal Sel Sol Stan Tal Tar Tel Tor Val Ver Vin Wal War Wes Wil Win Yar Zel
""")
_TAILS = _words("""
wick ford ton low mer lin ard ett ovan by dale mont more well ster ner gan dor ran las vin kin rick bury field ley nis
tas var zen mas roy bert nell quist hart stead holm
""")
_COMMON = _words("Barley Barn Barton Calmer Carton Farmer Former Garner Harmer Marvin Master Parley Solard Warmer")

_WOMEN = _words("""
Ada Alice Anna Bella Clara Cora Dora Edith Ella Emma Eva Fiona Flora Grace Hanna Helen Ida Iris Jane Julia Karen Laura
Lena Lily Lucy Maria Martha Mary Mina Nora Olga Paula Rita Rosa Ruth Sara Sofia Stella Susan Tina Vera Viola Wanda Zoe
Agnes Carla Diana Elsa
""")
_MEN = _words("""
Adam Alan Albert Amos Anton Arthur Boris Bruno Carl Cyril David Dennis Edgar Edwin Emil Eric Felix Frank Fred George
Hans Harry Henry Hugo Ivan Jack Jacob James Jonas Karl Leo Louis Luke Mark Martin Max Oscar Otto Paul Peter Ralph
Robert Simon Thomas Victor Walter Aaron Oliver
""")
_ADJECTIVES = _words("""
Silver Quiet Golden Broken Winter Summer Hidden Distant Silent Red Blue Green White Black Lost Last First Burning
Frozen Empty Little Old New Second Paper Glass Iron Copper Wooden Secret Hollow Bright Dark Crooked Gentle Sleeping
Wild Painted
""")
_NOUNS = _words("""
Lantern Harbor Orchard Mirror Bridge Garden Tower Letter Sparrow Engine Island Window Circus Feather Compass Needle
Candle Kitchen Meadow Station Ladder Ribbon Thunder Valley Anchor Arrow Basket Beacon Blanket Button Cabin Canyon
Carpet Castle Cedar Chapel Cherry Clock Cottage Cradle Crown Curtain Dancer Desert Diamond Dragon Drum Eagle Falcon
Fiddle Forest Fountain Fox Gate Glacier Hammer Harp Hawk Helmet Heron Horizon Horse Jungle Kettle Key Knight Lake
Lemon Lion Maple Marble Mask Mill Monkey Moon Mountain Oak Ocean Owl Palace Parrot Pearl Pepper Piano Pilot Pirate
Planet Prairie Rabbit Raven Rocket Rose Saddle Sailor Shadow Shepherd Singer Spider Statue Storm Swan Temple Throne
Tiger Train Tulip Tunnel Turtle Umbrella Violin Volcano Wagon Wheel Whistle Willow Wolf Zebra
""")


@dataclasses.dataclass(frozen=True)
class NamePool:
    """The words of one split. `stems` are invented; adjectives are shared, for no name is an adjective alone."""

    stems: tuple[str, ...]
    women: tuple[str, ...]
    men: tuple[str, ...]
    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]


@functools.cache
def name_pool(split: Split) -> NamePool:
    """The words that only entities of `split` are named with."""
    return NamePool(
        stems=_share(_stems(), split),
        women=_share(_WOMEN, split),
        men=_share(_MEN, split),
        nouns=_share(_NOUNS, split),
        adjectives=tuple(_ADJECTIVES),
    )


def _stems() -> list[str]:
    """Words none of which is a part of another one, or of a word that names are made with."""
    words = sorted({head + tail for head in _HEADS for tail in _TAILS if head[-2:] != 2 * tail[0]} - set(_COMMON))
    text = " ".join([*words, *_WOMEN, *_MEN, *_ADJECTIVES, *_NOUNS]).casefold()
    return [word for word in words if text.count(word.casefold()) == 1]


def _share(words: list[str], split: Split) -> tuple[str, ...]:
    """Each word belongs to one split, always the same one."""
    shuffled = sorted(set(words))
    random.Random(f"pools {len(words)}").shuffle(shuffled)
    start = 0
    for name in SPLITS:
        stop = start + round(_SHARES[name] * len(shuffled)) if name != SPLITS[-1] else len(shuffled)
        if name == split:
            return tuple(shuffled[start:stop])
        start = stop
    raise AssertionError(f"no such split: {split}")
