"""A GGUF file in real llama.cpp, through the package xllamacpp: completions, and the probabilities of a text.

    python examples/llama_cpp.py model.gguf "The capital of France is"

llama.cpp's server gives the probability of the token that it has drawn. A bias on the token that is to come makes it
draw this one, and the probability is that of before the bias: so the perplexity of a text is exact, token by token.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

FORCE = 1e4  # a bias on one logit that decides what is drawn


class LlamaCpp:
    """llama.cpp on the CPU, with one thread.

    Args:
        file: a GGUF file.
        context: tokens that it can look back on.
    """

    def __init__(self, file: str | Path, context: int = 512) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = context, 1, False, -1
        params.n_gpu_layers = 0
        params.fit_params = False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        self.server = xllamacpp.Server(params)
        self._letter = 1

    def complete(self, prompt: str, new_tokens: int = 40) -> str:
        """What the model writes after `prompt`, greedily."""
        request = {"prompt": prompt, "n_predict": new_tokens, "temperature": 0.0}
        return self._ask(request)["choices"][0]["text"]

    def log_probability(self, before: Sequence[int], token: int) -> float:
        """Logarithm of the probability of `token` after the ids `before`."""
        answer = self._ask({"prompt": list(before), "n_predict": 1, "n_probs": 1, "logit_bias": [[token, FORCE]]})
        said = answer["choices"][0]["logprobs"]
        if said is None:  # the end of the text, or a part of a letter: nothing is said of either
            return self.log_probabilities(before, 1 << 20)[token]
        assert said["content"][0]["id"] == token, said
        return said["content"][0]["logprob"]

    def log_probabilities(self, before: Sequence[int], vocabulary: int) -> list[float]:
        """The same of every token of the vocabulary."""
        while True:
            bias = [[self._letter, FORCE]]
            request = {"prompt": list(before), "n_predict": 1, "n_probs": vocabulary, "logit_bias": bias}
            said = self._ask(request)["choices"][0]["logprobs"]
            if said is not None:
                break
            self._letter += 1  # until a token is drawn of which llama.cpp says something
        found = {entry["id"]: entry["logprob"] for entry in said["content"][0]["top_logprobs"]}
        return [found[token] for token in range(min(vocabulary, len(found)))]

    def perplexity(self, windows: Sequence[Sequence[int]]) -> float:
        """Of every token of the windows but their first ones, each window read on its own."""
        total = [self.log_probability(ids[:end], ids[end]) for ids in windows for end in range(1, len(ids))]
        return math.exp(-sum(total) / len(total))

    def _ask(self, request: dict) -> dict:
        answer = self.server.handle_completions({"cache_prompt": True, **request})
        if "choices" not in answer:
            raise RuntimeError(f"llama.cpp answered {answer}")
        return answer


if __name__ == "__main__":
    print(LlamaCpp(sys.argv[1]).complete(sys.argv[2] if len(sys.argv) > 2 else "Once upon a time"))
