"""Plays episodes as agents should, or with a mistake that reflect has to find."""

import random
from typing import Literal

from lragent_jax.world.padding import NO_PADDING, Padding
from lragent_jax.world.question import Question
from lragent_jax.world.relations import relations_of
from lragent_jax.world.tools import Tool, Tools
from lragent_jax.world.transcript import (
    REFLECT_LABEL,
    Piece,
    Transcript,
    action_label,
    argument,
    know,
    look_up,
    need,
    observation,
    opening,
    tool_name,
    verdict_right,
    verdict_wrong,
)

Mistake = Literal["early", "relation", "entity", "value", "unknown"]
MISTAKES: tuple[Mistake, ...] = ("early", "relation", "entity", "value", "unknown")
"""`early` stops in front of the last hops, `relation` asks for another one, `entity` searches for another one of the
kind, `value` states another answer; `unknown` misspells an argument, and gets it right at the second try."""


def play(question: Question, padding: Padding = NO_PADDING, mistake: Mistake | None = None) -> list[Piece]:
    """The whole episode. From a mistake on, plan's and action's outputs are not to be learnt from.

    A mistake that this question has no room for is not made: there is no `early` with one hop, and an entity may have
    no other relation that leads on.
    """
    player = _Player(question, padding, question.rng(f"play {mistake}"))
    player.play(mistake)
    return player.transcript.pieces


class _Player:
    def __init__(self, question: Question, padding: Padding, rng: random.Random):
        self.transcript = Transcript()
        self._question, self._world, self._rng = question, question.world, rng
        self._tools = Tools(self._world, padding.results)
        self._step = 1
        self._led_astray = False
        self.transcript.add(opening(question.text, padding.notes))

    def play(self, mistake: Mistake | None) -> None:
        question, rng = self._question, self._rng
        at = rng.randrange(question.num_hops)
        relations = list(question.relations)
        reason, wrong_relation = None, None
        if mistake == "early" and question.num_hops > 1:
            at = rng.randrange(1, question.num_hops)
            relations, reason = relations[:at], f"the {relations[at]} is missing"
        if mistake == "relation" and (others := self._other_relations(at)):
            reason, wrong_relation = f"that is not the {relations[at]}", rng.choice(others)
            relations[at] = wrong_relation
        subject, of = question.path[0], question.path[0].partition(":")[0]
        for hop, relation in enumerate(relations):
            self._led_astray |= wrong_relation is not None and hop == at
            if mistake == "entity" and hop == at:
                subject, reason = self._other(subject, question.path[hop - 1] if hop else None), f"that is not the {of}"
                self._search(relation, of, subject, wrong=True)
            elif mistake == "unknown" and hop == at:
                self._search(relation, of, self._misspelt(subject), wrong=True)
                self._led_astray = False
                self._search(relation, of, subject)
            else:
                self._search(relation, of, subject)
            source, subject, of = subject, self._world.entities[subject].facts[relation], relation
            if relation not in self._seen(source):
                self._act(look_up(relation), "Lookup", relation)
                self._observe("Lookup", relation)
            if mistake == "value" and hop == question.num_hops - 1:
                subject, reason = self._other(subject, source), f"that is not the {relation}"
                self._led_astray = True
        self._led_astray |= reason is not None
        if reason is not None and subject == question.answer:
            reason = None  # the wrong way led to the right place
        name = subject.partition(": ")[2]
        self._act(know(of, name), "Finish", subject)
        verdict = verdict_right(of, name) if reason is None else verdict_wrong(reason)
        self.transcript.add(REFLECT_LABEL)
        self.transcript.add(verdict, "reflect")

    def _search(self, relation: str, of: str, key: str, *, wrong: bool = False) -> None:
        self._act(need(relation, of), "Search", key, wrong_argument=wrong)
        self._observe("Search", key)

    def _act(self, thought: str, tool: Tool, text: str, *, wrong_argument: bool = False) -> None:
        taught = not self._led_astray
        self.transcript.add(thought, "plan", taught=taught)
        self.transcript.add(action_label(self._step))
        self.transcript.add(tool_name(tool), "plan", taught=taught)
        self._led_astray |= wrong_argument
        self.transcript.add(argument(text), "action", taught=taught and not wrong_argument)

    def _observe(self, tool: Tool, text: str) -> None:
        self.transcript.add(observation(self._step, self._tools.call(tool, text)))
        self._step += 1

    def _seen(self, key: str) -> set[str]:
        """The relations that Search shows of an entity."""
        document = self._world.document(key)
        return set(document.by_relation) if document.num_opening is None else set()

    def _other_relations(self, hop: int) -> list[str]:
        """What one may ask for instead at this hop and still go on."""
        question = self._question
        kinds = [key.partition(":")[0] for key in question.path]
        last = hop == question.num_hops - 1
        others = [
            r for r in relations_of(self._world.entities[question.path[hop]].kind) if last or r.range == kinds[hop + 1]
        ]
        return [relation.name for relation in others if relation.name != question.relations[hop]]

    def _other(self, key: str, source: str | None) -> str:
        """Another entity of the kind: one from the document that led to it, if there is one."""
        kind = self._world.entities[key].kind
        near = list(self._world.entities[source].facts.values()) if source else []
        others = [other for other in near if other.startswith(f"{kind}:") and other != key]
        return self._rng.choice(others or [e.key for e in self._world.by_kind[kind] if e.key != key])

    def _misspelt(self, key: str) -> str:
        at = self._rng.randrange(key.index(":") + 3, len(key))
        return key[:at] + key[at + 1 :]
