"""Answers held to a JSON schema or a grammar: the options, and what they name. Knows typer, not how tokens are held."""

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import typer

from qrun.cli.prompts import read_file
from qrun.cli.spread import Rival
from qrun.errors import UsageError

if TYPE_CHECKING:
    from qrun.sampler import Constraint
    from qrun.session import Session

STRUCTURE_PANEL = "Answers with a form"
RIVAL = Rival("structure")


@dataclasses.dataclass(frozen=True)
class Structure:
    """What answers must look like; a constraint of its own for each reply."""

    kind: Literal["json_schema", "grammar"]
    text: str

    @classmethod
    def of_schema(cls, value: Any) -> Self | None:
        """Return one from a field of a request, None if it is no schema at all."""
        text = value if isinstance(value, str) else json.dumps(value)
        return cls("json_schema", text) if isinstance(value, str | dict) else None

    @classmethod
    def of_grammar(cls, value: Any) -> Self | None:
        """Return one from a field of a request, None if it is no text."""
        return cls("grammar", value) if isinstance(value, str) else None

    def check(self) -> None:
        """Refuse a schema or grammar that no model could follow.

        Raises:
            UsageError: it is malformed or uses what is not supported, or llguidance is not installed.
        """
        from qrun import grammar

        (grammar.check_json_schema if self.kind == "json_schema" else grammar.check_grammar)(self.text)

    def constraint(self, session: "Session") -> "Constraint":
        """Return what holds one reply of a session to this.

        Raises:
            UsageError: as `check`, or it does not go with the model's tokens.
        """
        from qrun import grammar

        make = grammar.json_schema if self.kind == "json_schema" else grammar.grammar
        tokenizer = session.tokenizer
        return make(tokenizer, session.engine.config.vocab, self.text, tokenizer.stop_ids)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructureOptions:
    """What answers must look like."""

    json_schema: Annotated[
        str | None,
        typer.Option(
            "-j",
            "--json-schema",
            metavar="TEXT|FILE",
            help="Answer with JSON that fits this schema: its text, or a file; '{}' is any JSON.",
            rich_help_panel=STRUCTURE_PANEL,
        ),
        RIVAL,
    ] = None
    grammar: Annotated[
        str | None,
        typer.Option(
            "--grammar",
            metavar="TEXT|@FILE",
            help='Answer in a language of your own, in Lark\'s notation: \'start: "yes" | "no"\'.',
            rich_help_panel=STRUCTURE_PANEL,
        ),
        RIVAL,
    ] = None

    def structure(self) -> Structure | None:
        """Return what was asked for, files read; None where answers are free.

        Raises:
            UsageError: both options are given, or a file cannot be read.
        """
        if self.json_schema is not None and self.grammar is not None:
            raise UsageError("--json-schema and --grammar contradict each other: give one of them")
        if self.json_schema is not None:
            return Structure("json_schema", _schema_text(self.json_schema))
        if self.grammar is not None:
            named = self.grammar.startswith("@")
            return Structure("grammar", read_file(self.grammar[1:]) if named else self.grammar)
        return None


def _schema_text(given: str) -> str:
    """Return a schema that is given as it is, or as the name of a file, with an @ or without."""
    return given if given.lstrip().startswith("{") else read_file(given.removeprefix("@"))
