"""Llasa (arXiv 2502.04128): speech synthesis as plain causal language modelling, and search that verifiers guide.

A codec with one codebook turns 16 kHz speech into 50 codes a second; these become tokens of a Llama's tokenizer, and
the ordinary Trainer trains text → codes. At inference recognisers and speaker encoders judge sampled candidates.
"""

from typing import TYPE_CHECKING

from hf_stablespam._names import lazy_attributes

if TYPE_CHECKING:
    from hf_stablespam.recipes.llasa.codec import decode_speech, encode_speech
    from hf_stablespam.recipes.llasa.collator import SpeechTokenCollator
    from hf_stablespam.recipes.llasa.logits_processor import SpeechTokensLogitsProcessor
    from hf_stablespam.recipes.llasa.prompts import speech_prompt
    from hf_stablespam.recipes.llasa.search import best_of_n, process_beam_search
    from hf_stablespam.recipes.llasa.selection import SearchResult, select_beams
    from hf_stablespam.recipes.llasa.verifiers import SpeakerSimilarityVerifier, WordErrorVerifier, combine
    from hf_stablespam.recipes.llasa.vocabulary import SpeechVocabulary, add_speech_tokens

__all__ = [
    "SearchResult",
    "SpeakerSimilarityVerifier",
    "SpeechTokenCollator",
    "SpeechTokensLogitsProcessor",
    "SpeechVocabulary",
    "WordErrorVerifier",
    "add_speech_tokens",
    "best_of_n",
    "combine",
    "decode_speech",
    "encode_speech",
    "process_beam_search",
    "select_beams",
    "speech_prompt",
]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    {
        "SearchResult": f"{__name__}.selection",
        "SpeakerSimilarityVerifier": f"{__name__}.verifiers",
        "SpeechTokenCollator": f"{__name__}.collator",
        "SpeechTokensLogitsProcessor": f"{__name__}.logits_processor",
        "SpeechVocabulary": f"{__name__}.vocabulary",
        "WordErrorVerifier": f"{__name__}.verifiers",
        "add_speech_tokens": f"{__name__}.vocabulary",
        "best_of_n": f"{__name__}.search",
        "combine": f"{__name__}.verifiers",
        "decode_speech": f"{__name__}.codec",
        "encode_speech": f"{__name__}.codec",
        "process_beam_search": f"{__name__}.search",
        "select_beams": f"{__name__}.selection",
        "speech_prompt": f"{__name__}.prompts",
    },
)
