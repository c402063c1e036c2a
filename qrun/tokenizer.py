"""Text to ids and back, for whole conversations and for streams; knows files and text, no model and no device."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from qrun.errors import TemplateError, TokenizerError
from qrun.reasoning import CLOSE, OPEN
from qrun.template import ChatTemplate, Message, find_template, mark, split_marked
from qrun.tokenizer_files import add_declared, eos_ids, named_tokens, read_core, read_json

# Ends of a document: a chat is over at any of them. Ends of a turn: only where the checkpoint itself uses them.
_DOCUMENT_ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")
_TURN_ENDS = ("<|end_of_sentence|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>")
_PATIENCE = 32  # tokens without a whole code point after which a stream gives up on it


@dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's tokenizer with its special tokens and chat template resolved. Made by ``from_dir``.

    vocab_size: one more than the highest id. special_ids: ids that never print. stop_ids: ids that end a reply.
    control: strings that would become control tokens if a message's text were encoded as it is.
    thinks: whether template or vocabulary know ``<think>``, the mark of reasoning.
    """

    directory: Path
    vocab_size: int
    special_ids: frozenset[int]
    stop_ids: frozenset[int]
    control: frozenset[str]
    thinks: bool
    _core: tokenizers.Tokenizer
    _template: ChatTemplate | TemplateError

    @classmethod
    def from_dir(cls, path: str | Path, vocab_size: int | None = None) -> "Tokenizer":
        """The tokenizer of a checkpoint directory; ``vocab_size`` is the model's, for checking.

        TokenizerError: files are missing, damaged or oversized, or ids exceed the model's vocabulary. A missing or
        bad chat template is an error only once a chat is rendered.
        """
        directory = Path(path)
        core = read_core(directory)
        config = read_json(directory / "tokenizer_config.json")
        named = named_tokens(config, read_json(directory / "special_tokens_map.json"))
        add_declared(core, config, named, directory)
        size = 1 + max(core.get_vocab(with_added_tokens=True).values(), default=-1)
        if vocab_size is not None and size > vocab_size:
            raise TokenizerError(
                f"{directory / 'tokenizer.json'}: ids go up to {size - 1}, but the model's vocab_size is {vocab_size}; "
                "the tokenizer belongs to another model: fetch both from one source"
            )
        template: ChatTemplate | TemplateError
        try:
            template = find_template(directory, config, named)
        except TemplateError as error:
            template = error
        source = template.source if isinstance(template, ChatTemplate) else ""
        added = core.get_added_tokens_decoder()
        special = {token.content: index for index, token in added.items() if token.special}
        turn_ends = [end for end in _TURN_ENDS if end in source or end in named.values()]
        ends = [*_DOCUMENT_ENDS, *turn_ends, *([named["eos_token"]] if "eos_token" in named else [])]
        return cls(
            directory=directory,
            vocab_size=size,
            special_ids=frozenset(special.values()),
            stop_ids=frozenset(i for i in eos_ids(directory, config) if 0 <= i < size)
            | {special[end] for end in ends if end in special},
            control=frozenset(special)
            | {t.content for t in added.values() if t.content in source and not t.content.isspace()},
            thinks=OPEN in source or any(token.content == OPEN for token in added.values()),
            _core=core,
            _template=template,
        )

    @property
    def template(self) -> ChatTemplate:
        """The chat template. TemplateError if the checkpoint has none, or it cannot be used."""
        if isinstance(self._template, TemplateError):
            raise self._template.with_traceback(None)
        return self._template

    def token_id(self, token: str) -> int | None:
        """The id of one token by its exact text, or None."""
        return self._core.token_to_id(token)

    def to_json(self) -> str:
        """What tokenizer.json would say, with the tokens that the other files declare."""
        return self._core.to_str()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text. special: control strings in it count, and the checkpoint's own prefix (BOS) is added.

        With ``special=False`` the text is only text: no prefix, and ``</s>`` is four characters.
        """
        if special:
            return self._ids(_whole(text), prefix=True)
        return self.encode_marked(mark(_whole(text), self.control))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens left out; bytes that form no character become U+FFFD."""
        return self._decode([i for i in ids if i not in self.special_ids])

    def _decode(self, ids: list[int]) -> str:
        return self._core.decode(ids, skip_special_tokens=False)

    def text_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The exact text that ids add to ``before``: special tokens and a leading space included."""
        tail = list(before[-8:])
        return self._decode([*tail, *ids])[len(self._decode(tail)) :]

    def stream(self, *, after: Sequence[int] = (), keep: Collection[int] = ()) -> "StreamDecoder":
        """A decoder for ids that arrive one at a time. after: ids they follow, so that a leading space is kept.
        keep: special ids to print all the same.
        """
        tail = [i for i in after[-8:] if i not in self.special_ids]
        whole = (tail[start:] for start in range(len(tail)) if "\ufffd" not in self._decode(tail[start:]))
        return StreamDecoder(self._decode, self.special_ids.difference(keep), next(whole, list[int]()))

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, thinking: bool | None = None
    ) -> str:
        """The conversation as the text the model reads. TemplateError: see ``ChatTemplate.render``."""
        return self.template.render(messages, add_generation_prompt=add_generation_prompt, thinking=thinking)

    def encode_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, thinking: bool | None = None
    ) -> list[int]:
        """The conversation as ids. Control strings inside messages stay text: they cannot end or forge a turn."""
        text = self.render_marked(messages, add_generation_prompt=add_generation_prompt, thinking=thinking)
        return self.encode_marked(text)

    def render_marked(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, thinking: bool | None = None
    ) -> str:
        """Like ``render``, with control strings of the messages in marks, for ``encode_marked``."""
        safe: list[Message] = []
        for message in messages:
            copy = message.copy()
            copy["content"] = self.mark(message["content"], message["role"])
            if "reasoning_content" in message:
                copy["reasoning_content"] = self.mark(message["reasoning_content"], message["role"])
            safe.append(copy)
        return self.template.render(safe, add_generation_prompt=add_generation_prompt, thinking=thinking)

    def mark(self, text: str, role: str) -> str:
        """A message's text as it appears in ``render_marked``.

        The tags of reasoning are left alone in the assistant's messages: some templates look for them there.
        """
        return mark(_whole(text), self.control - {OPEN, CLOSE} if role == "assistant" else self.control)

    def encode_marked(self, text: str, *, continues: bool = False) -> list[int]:
        """Ids of rendered text. continues: it follows other text, so it gets no prefix space of its own.

        Without marks, and not continuing, this is exactly the tokenizer's encoding of the whole text.
        """
        ids: list[int] = []
        for piece, literal in split_marked(text, self.control):
            follows = continues or bool(ids)
            if literal:  # cut after its first character, no piece of it is a control token
                ids += self._encode(piece[:1], follows)
                ids += self._encode(piece[1:], True)
            else:
                ids += self._encode(piece, follows)
        return ids

    def _encode(self, text: str, follows: bool) -> list[int]:
        # SentencePiece tokenizers put a space before a text (then a line break alone takes two ids), but not behind
        # a line break.
        line = self._ids("\n")
        if follows and len(line) > 1:
            behind = self._ids("\n" + text)
            if behind[: len(line)] == line:
                return behind[len(line) :]
        return self._ids(text)

    def _ids(self, text: str, *, prefix: bool = False) -> list[int]:
        try:
            return self._core.encode(text, add_special_tokens=prefix).ids
        except Exception as error:  # of no narrower kind: what the library raises at a model that cannot encode
            raise TokenizerError(
                f"{self.directory / 'tokenizer.json'}: cannot encode {text[:40]!r} ({error}); fetch the file again"
            ) from error


class StreamDecoder:
    """Text from ids as they come: whole code points only, nothing lost, nothing twice; constant work an id.

    It decodes a short window that starts at the last id whose text was whole, and emits what is new: what a token
    prints can depend on the one before (bytes of one character, leading spaces).
    """

    def __init__(self, decode: Callable[[list[int]], str], skip: Collection[int], context: Sequence[int] = ()) -> None:
        """skip: ids that print nothing. context: ids that came before; their text is not emitted."""
        self._decode = decode
        self._skip = skip
        self._window = list(context)
        self._settled = len(self._window)  # ids of the window whose text is out
        self._sent = len(decode(self._window))  # characters of the window's text that are out

    def push(self, token_id: int) -> str:
        """The text that became certain with this id; often empty in the middle of a character."""
        if token_id in self._skip:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        whole = text.rstrip("\ufffd")
        if len(whole) < len(text) and len(self._window) - self._settled < _PATIENCE:
            out = whole[self._sent :]
            self._sent += len(out)
            return out
        return self._settle(text)

    def flush(self) -> str:
        """What is left at the end; an unfinished character becomes U+FFFD."""
        return self._settle(self._decode(self._window))

    def _settle(self, text: str) -> str:
        out = text[self._sent :]
        if out or len(self._window) - self._settled >= _PATIENCE:
            del self._window[: self._settled]
            self._settled = len(self._window)
            self._sent = len(self._decode(self._window))
        return out


def _whole(text: str) -> str:
    """``text`` without lone surrogates, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")
