"""The attention pattern of a block-causal pass, as functions of column indices: no `[T, T]` array is stored."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Layout(NamedTuple):
    """Columns of a pass under block-causal attention: a clean copy of a text, then optionally a noisy copy of its end.

    A clean column attends to the clean columns of its block and of the blocks before it. A noisy column attends to the
    noisy columns of its block and to the clean columns of the blocks before it (BD3LM, arXiv 2503.09573, section 3.2).
    So one pass over both copies computes each noisy block as the continuation of a clean text.

    Attributes:
      size: columns of a block.
      clean: columns of the clean copy.
      first: the column of the text with which the noisy copy begins, a multiple of `size`.
    """

    size: int
    clean: int
    first: int = 0

    def place(self, index: Any) -> Any:
        """Returns the column of the text that the pass has at an index; both copies of a column have the same one."""
        return index - (index >= self.clean).astype(np.int32) * (self.clean - self.first)

    def attends(self, query: Any, key: Any) -> Any:
        """Returns whether the column at index `query` attends to the one at index `key`; arrays are broadcast."""
        noisy_query, noisy_key = query >= self.clean, key >= self.clean
        of_query, of_key = self._block(self.place(query)), self._block(self.place(key))
        earlier = of_key + noisy_query.astype(np.int32) <= of_query
        return (~noisy_key & earlier) | (noisy_key & noisy_query & (of_key == of_query))

    def _block(self, column: Any) -> Any:
        # A kernel shifts faster than it divides.
        power = self.size.bit_length() - 1
        return column >> power if self.size == 1 << power else column // self.size
