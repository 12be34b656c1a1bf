"""Converts between text and token ids with a checkpoint's tokenizer and chat template, and pads prompts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gdsd_jax.families import FAMILIES
from gdsd_jax.hub.declared import declared as declarations
from gdsd_jax.hub.files import MOST_JSON_BYTES, checked_directory, on_disk, read_json, require_own_files
from gdsd_jax.hub.panics import panics_refused
from gdsd_jax.hub.templates import Renderer
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.files import understood

# Tokenizer classes that exist only as Python files beside a checkpoint, each with the class of transformers that
# computes the same from the same files. So code of a checkpoint is never run.
_EQUIVALENT = {name: known for family in FAMILIES.values() for name, known in family.tokenizer_classes.items()}
# All files that a tokenizer may consist of; they are copied if the directory is in a bucket.
_FILES = ("*.json", "*.jinja", "*.txt", "*.model")


# A Unicode noncharacter, which no proper text contains. It is put after the first character of a special token that a
# user wrote, so that the tokenizer does not take it for one.
_GUARD = "\ufdd0"
# What is said of a text at which the tokenizers library panics, and of files that it does not read.
_FAILS = "its tokenizer.json fails at a text", "use the one of the published checkpoint"
_UNREADABLE = "its tokenizer does not load", "download it again"


class Tokenizer:
    """A checkpoint's tokenizer with the ids that masked diffusion needs.

    Attributes:
      mask_token_id, eos_token_id, pad_token_id: the tokenizer's ids, or those of `config.json` where it has none.
      bos_token_id: the tokenizer's id, or None.
      end_token_ids: other ids that end a turn: further ids of `eos_token_id` in `config.json` or
        `generation_config.json`, and the special token that the chat template writes after an answer.
      special_in_text: whether special tokens in the text of users are encoded as special tokens. If not, they are
        encoded like any other text, and only the chat template makes special tokens.
      embedded: the number of rows of the model's embedding, or None. A text with an id beyond them is refused.
      vocab_size: one more than the largest id that the tokenizer knows; the embedding may have more rows.
    """

    def __init__(
        self,
        directory: os.PathLike,
        tokenizer: Any,
        config: Mapping[str, Any],
        generation: Mapping[str, Any] | None = None,
        overrides: Mapping[str, Any] | None = None,
    ):
        self._overrides = {key: value for key, value in (overrides or {}).items() if value is not None}
        self._directory = directory
        self._tokenizer = tokenizer
        self.special_in_text = False
        self.embedded: int | None = None
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        alternatives = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
        self._special_text = re.compile(f"({alternatives})") if special else None
        # Matches wherever a special token begins, also inside another one.
        self._special_start = re.compile(f"(?={alternatives})(.)", re.DOTALL) if special else None
        template = tokenizer.chat_template
        template = template.get("default") if isinstance(template, Mapping) else template
        variables = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        self._renderer = Renderer(template, variables, directory) if isinstance(template, str) and template else None
        self.vocab_size: int = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))
        self.mask_token_id = self._special("mask_token_id", config)
        self.eos_token_id = self._special("eos_token_id", config)
        self.pad_token_id = self._special("pad_token_id", config)
        self.bos_token_id: int | None = tokenizer.bos_token_id
        self.end_token_ids = self._further_ends(config, generation or {})
        named = config.get("mask_token_id", self.mask_token_id)
        if named != self.mask_token_id:
            raise UserError(
                f"{directory}: mask_token_id is {named} in config.json but {self.mask_token_id} in the tokenizer: "
                "make tokenizer_config.json and config.json agree"
            )

    def _special(self, name: str, config: Mapping[str, Any]) -> int:
        value = self._overrides.get(name, getattr(self._tokenizer, name))
        if value is None:
            value = config.get(name)
            # A list holds ids that end a turn, of which the first is the EOS.
            value = value[0] if isinstance(value, list) and value else value
        known = isinstance(value, int) and value >= 0 and self._tokenizer.convert_ids_to_tokens(value) is not None
        if not known:
            token = name.removesuffix("_id")
            raise UserError(
                f"{self._directory}: the tokenizer has no {token} and no token of id {value!r}: "
                f"set {token} in tokenizer_config.json, or config.checkpoint_overrides.{name}"
            )
        return value

    def _further_ends(self, config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
        found = []
        for source in (config, generation):
            value = source.get("eos_token_id")
            found += value if isinstance(value, list) else [value]
        found.append(self._end_of_turn())
        known = [token for token in found if type(token) is int and 0 <= token < self.vocab_size]
        return tuple(dict.fromkeys(token for token in known if token not in (self.eos_token_id, self.mask_token_id)))

    def _end_of_turn(self) -> int | None:
        """Returns the special token that the chat template writes after an answer, or None if it writes none."""
        answer = "ANSWER"
        if self._renderer is None:
            return None
        messages = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": answer}]
        try:
            text = self._renderer.render(messages, add_generation_prompt=False)
        except UserError:
            return None
        first = self.encode([text.rpartition(answer)[2].strip()])[0][:1] if answer in text else []
        return first[0] if first and first[0] in self._tokenizer.added_tokens_decoder else None

    @property
    def chat_template(self) -> str | None:
        """Returns the text of the checkpoint's chat template, or None."""
        return self._tokenizer.chat_template

    def render(self, messages: Sequence[Mapping[str, str]], assistant_prefix: str = "") -> str:
        """Returns the text of a chat prompt up to where the assistant's answer starts, followed by `assistant_prefix`.

        Args:
          messages: a mapping `{"role": ..., "content": ...}` for each turn.

        Raises:
          UserError: the checkpoint has no chat template, or the template refuses the messages.
        """
        if not self._tokenizer.chat_template:
            raise UserError(
                f"{self._directory} has no chat template: add chat_template.jinja, "
                "or chat_template in tokenizer_config.json"
            )
        if isinstance(self._tokenizer.chat_template, Mapping) and "default" not in self._tokenizer.chat_template:
            raise UserError(
                f"{self._directory} has the chat templates {', '.join(self._tokenizer.chat_template)} and none named "
                "default: name one of them so under chat_template in tokenizer_config.json, or add chat_template.jinja"
            )
        if self._renderer is None:
            raise UserError(f"{self._directory}: chat_template is not a text: fix it in tokenizer_config.json")
        if not self.special_in_text:
            messages = [{name: self._guarded(value) for name, value in message.items()} for message in messages]
        return self._renderer.render(messages, add_generation_prompt=True) + assistant_prefix

    def _guarded(self, text: Any) -> Any:
        """Returns the text of a user with a guard character inside everything that would be read as a special token."""
        if not isinstance(text, str) or self._special_start is None:
            return text
        return self._special_start.sub(rf"\1{_GUARD}", text.replace(_GUARD, "\ufffd"))

    def encode(self, texts: Sequence[str], add_bos: bool = False) -> list[list[int]]:
        """Returns the token ids of rendered texts.

        Special tokens in a text are encoded as such, except those that carry a guard because a user wrote them. No
        special tokens are added. Half of a surrogate pair, which no tokenizer takes, becomes a question mark.

        Args:
          add_bos: put the BOS in front of each text that does not begin with it.

        Raises:
          UserError: an id is beyond the embedding (see `embedded`), or the tokenizer fails at a text.
        """
        if not len(texts):
            return []
        texts = [text if text.isascii() else text.encode("utf-8", "replace").decode() for text in texts]
        plain = [text.replace(_GUARD, "") for text in texts]
        with panics_refused(self._directory, *_FAILS):
            ids = self._tokenizer(plain, add_special_tokens=False, return_attention_mask=False)["input_ids"]
            ids = [self._in_parts(text) if _GUARD in text else one for text, one in zip(texts, ids, strict=True)]
        largest = max((max(one) for one in ids if one), default=0)
        if self.embedded is not None and largest >= self.embedded:
            raise UserError(
                f"{self._directory}: the tokenizer makes the id {largest} of a text, the embedding has {self.embedded} "
                "rows: the tokenizer is of another model"
            )
        if not add_bos:
            return ids
        return [one if one[:1] == [self.bos_token_id] else [self.bos_token_id, *one] for one in ids]

    def encode_text(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of texts by users: special tokens in them are plain text, unless `special_in_text`."""
        return self.encode(texts if self.special_in_text else [self._guarded(text) for text in texts])

    def _in_parts(self, text: str) -> list[int]:
        """Returns the ids of a text with guards: its special tokens as such, and the parts between as plain text."""
        ids = []
        for index, part in enumerate(self._special_text.split(text)):
            if index % 2:
                ids.append(self._tokenizer.convert_tokens_to_ids(part))
            elif part:
                part = part.replace(_GUARD, "")
                ids += self._tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def prompts(
        self, texts: Sequence[str], *, buckets: Sequence[int], overlong: str, add_bos: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encodes texts and pads them on the left to the smallest bucket that holds all of them.

        The buckets keep the number of compiled shapes small.

        Args:
          buckets: the lengths to choose from.
          overlong: what to do with a prompt longer than the largest bucket: "error" refuses it, "keep_last" keeps its
            last tokens.
          add_bos: see `encode`.

        Returns:
          tokens `[B, P]` int32, and their mask `[B, P]` bool, True on real tokens.

        Raises:
          UserError: a prompt is too long under "error", there are no buckets, or `overlong` is unknown.
        """
        if overlong not in ("error", "keep_last"):
            raise UserError(f"overlong {overlong!r} is neither 'error' nor 'keep_last': change config.overlong_prompts")
        if not buckets or min(buckets) < 1:
            raise UserError(f"prompt buckets {tuple(buckets)} are not positive lengths: change config.prompt_buckets")
        ids = self.encode(texts, add_bos)
        largest = max(buckets)
        longest = max(map(len, ids), default=0)
        if longest > largest and overlong == "error":
            row = next(row for row, one in enumerate(ids) if len(one) > largest)
            raise UserError(
                f"prompt {row} has {len(ids[row])} tokens and the largest bucket {largest}: "
                "add a larger one to config.prompt_buckets"
            )
        length = min(bucket for bucket in buckets if bucket >= min(longest, largest))
        tokens = np.full((len(ids), length), self.pad_token_id, np.int32)
        mask = np.zeros((len(ids), length), bool)
        for row, one in enumerate(ids):
            kept = one[-length:]
            if kept:
                tokens[row, -len(kept) :] = kept
                mask[row, -len(kept) :] = True
        return tokens, mask

    def decode(self, tokens: np.ndarray | Sequence[Sequence[int]]) -> list[str]:
        """Returns the text of each row of `[B, L]` completion ids up to its first end token, without special tokens."""
        return self._texts([self._before_end(row) for row in np.asarray(tokens).tolist()], skip=True)

    def decode_one(self, ids: np.ndarray | Sequence[int], special: bool = True) -> str:
        """Returns the text of one whole sequence for display; special tokens are shown if `special`."""
        return self._texts([np.asarray(ids).tolist()], skip=not special)[0]

    def decode_each(self, ids: Sequence[int]) -> list[str]:
        """Returns the text of each single token, special tokens included."""
        return self._texts([[token] for token in ids], skip=False)

    def _before_end(self, ids: list[int]) -> list[int]:
        ends = {self.eos_token_id, *self.end_token_ids}
        return ids[: next((index for index, token in enumerate(ids) if token in ends), None)]

    def _texts(self, rows: Sequence[list[int]], skip: bool) -> list[str]:
        options = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": False}
        with panics_refused(self._directory, *_FAILS):
            return [self._tokenizer.decode(ids, **options) for ids in rows]


def load_tokenizer(directory: str | os.PathLike, overrides: Mapping[str, Any] | None = None) -> Tokenizer:
    """Loads a checkpoint directory's tokenizer from its files alone, without a network or the checkpoint's code.

    Token ids in `overrides` take precedence over those of the tokenizer.

    Raises:
      UserError: the directory or its tokenizer files are absent or damaged; the mask, EOS or pad token is missing; or
        the mask ids of tokenizer and `config.json` differ.
    """
    import transformers

    directory = checked_directory(directory)
    config = declarations(directory, overrides)  # which refuses tokenizers that grow without bound
    settings = directory / "generation_config.json"
    generation = read_json(settings) if settings.is_file() else {}
    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        raise UserError(f"{directory} has no tokenizer: copy tokenizer.json and tokenizer_config.json there")
    require_own_files(directory, (*_FILES, "additional_chat_templates/*"))
    file = directory / "tokenizer_config.json"
    declared = read_json(file, MOST_JSON_BYTES).get("tokenizer_class") if file.is_file() else None
    try:
        with on_disk(directory, _FILES) as folder, panics_refused(directory, *_UNREADABLE):
            if isinstance(declared, str) and declared in _EQUIVALENT:
                tokenizer = getattr(transformers, _EQUIVALENT[declared]).from_pretrained(folder, local_files_only=True)
            else:
                # An empty configuration, because the checkpoint's own would make transformers ask to run its code.
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    folder,
                    config=transformers.PretrainedConfig(),
                    trust_remote_code=False,
                    local_files_only=True,
                )
    except UserError:
        raise
    except Exception as error:  # which the tokenizers library raises itself on a damaged file
        if isinstance(declared, str) and not hasattr(transformers, declared):
            raise UserError(
                f"{file} names the tokenizer class {declared}, which is code of the checkpoint and is never run: set "
                "tokenizer_class there to the class of transformers that reads the same files (PreTrainedTokenizerFast "
                "reads tokenizer.json)"
            ) from None
        first = str(error).strip().splitlines()[:1]
        failure, remedy = _UNREADABLE
        raise UserError(f"{directory}: {failure} ({' '.join(first)}): {remedy}") from None
    with understood(directory, "fix its tokenizer_config.json and config.json, or download them again"):
        return Tokenizer(directory, tokenizer, config, generation, overrides)
