"""Commands named by two words, as `qrun bench compare`, beside one that takes arguments of its own, as `qrun bench`."""

from typing import Any

from qrun.cli.helptext import Group


class TwoWords(Group):
    """A group in which `bench compare` may be a command's name; a model of that name is given as `./compare`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the name, the command and the arguments left over."""
        name = " ".join(args[:2])
        if len(args) > 1 and name in self.commands:
            return name, self.commands[name], args[2:]
        return super().resolve_command(ctx, args)
