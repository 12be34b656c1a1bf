"""The attention pattern of a block-causal pass, as functions of column indices: no `[T, T]` array is stored."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Layout(NamedTuple):
    """The columns of a pass under block-causal attention: a clean text, then optionally a noisy copy of its end.

    A clean column attends to the clean columns of its block and of the blocks before it. A noisy column attends to the
    noisy columns of its block and to the clean columns of the blocks before it (BD3LM, arXiv 2503.09573, section 3.2).
    One pass over both copies thus computes each noisy block as the continuation of a clean text.

    Attributes:
      size: number of columns in a block.
      clean: number of columns in the clean copy.
      first: the column of the text at which the noisy copy begins, a multiple of `size`.
    """

    size: int
    clean: int
    first: int = 0

    def place(self, index: Any) -> Any:
        """Returns the column of the text that lies at an index of the pass; both copies of a column share it."""
        return index - (index >= self.clean).astype(np.int32) * (self.clean - self.first)

    def attends(self, query: Any, key: Any) -> Any:
        """Returns whether the column at index `query` attends to the one at index `key`; arrays are broadcast."""
        noisy_query, noisy_key = query >= self.clean, key >= self.clean
        query_block, key_block = self._block(self.place(query)), self._block(self.place(key))
        # A clean query sees its own block of clean keys; a noisy query sees only those before its block.
        visible = key_block + noisy_query.astype(np.int32) <= query_block
        return (~noisy_key & visible) | (noisy_key & noisy_query & (key_block == query_block))

    def _block(self, column: Any) -> Any:
        # Kernels shift faster than they divide.
        power = self.size.bit_length() - 1
        return column >> power if self.size == 1 << power else column // self.size
