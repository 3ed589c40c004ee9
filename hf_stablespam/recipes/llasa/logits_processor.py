"""`SpeechTokensLogitsProcessor`: after the start of speech nothing but codes and the end of speech."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor

from hf_stablespam.recipes.llasa.vocabulary import SpeechVocabulary


class SpeechTokensLogitsProcessor(LogitsProcessor):
    """Scores of −inf for all tokens but codes, and for the end of speech until `min_codes` codes are written.

    Args:
        vocabulary: what `add_speech_tokens` returned.
        min_codes: codes before the end is allowed; default 1, so that speech is never empty.
        prompt_length: tokens of the prompt, whose reference codes do not count; default None: all tokens after the
            last ``<|SPEECH_GENERATION_START|>`` count.

    Raises:
        ValueError: a negative `min_codes`; in a call, scores of a model that has no rows for the vocabulary.

    Example:
        >>> processor = SpeechTokensLogitsProcessor(vocabulary)  # doctest: +SKIP
        >>> model.generate(prompt, logits_processor=[processor], eos_token_id=vocabulary.end_id)  # doctest: +SKIP
    """

    def __init__(self, vocabulary: SpeechVocabulary, min_codes: int = 1, *, prompt_length: int | None = None) -> None:
        if min_codes < 0:
            raise ValueError(f"min_codes must be at least 0, got {min_codes}")
        self.vocabulary = vocabulary
        self.min_codes = min_codes
        self.prompt_length = prompt_length

    def __call__(
        self,
        input_ids: torch.Tensor,  # (sequences, tokens)
        scores: torch.Tensor,  # (sequences, vocabulary)
    ) -> torch.Tensor:
        """The scores, in a new tensor."""
        first, last = self.vocabulary.first_code, self.vocabulary.first_code + self.vocabulary.codebook_size
        end = self.vocabulary.end_id
        if scores.shape[-1] < max(last, end + 1):
            raise ValueError(
                f"the model scores {scores.shape[-1]} tokens, but the speech vocabulary needs {max(last, end + 1)}: "
                "call add_speech_tokens(tokenizer, codebook_size, model=model)"
            )
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, first:last] = scores[:, first:last]
        enough = self._codes_written(input_ids) >= self.min_codes
        allowed[:, end] = torch.where(enough, scores[:, end], -torch.inf)
        return allowed

    def _codes_written(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(sequences,) or a scalar: how many tokens stand after the prompt."""
        length = input_ids.shape[1]
        if self.prompt_length is not None:
            return torch.tensor(length - self.prompt_length, device=input_ids.device)
        positions = torch.arange(1, length + 1, device=input_ids.device)
        starts = torch.where(input_ids == self.vocabulary.start_id, positions, 0)
        return length - starts.amax(dim=1)
