"""Ask how likely texts are: the perplexity of whole ones, and which of several answers a model would give."""

import math

from ernie45 import ErnieModel

CANDIDATES = ("Paris", "Berlin", "Madrid")

with ErnieModel.from_pretrained("ernie45/tiny-dense") as model:
    prompt = model.render([{"role": "user", "content": "What is the capital of France?"}])
    for answer in CANDIDATES:
        score = model.score([*prompt.token_ids, *model.tokenizer.encode(answer)])
        # logprobs[i] belongs to token i + 1, so these are those of the answer alone.
        logprob = math.fsum(score.logprobs[len(prompt) - 1 :])
        print(f"{answer}: probability {math.exp(logprob):.3f}, perplexity of all {score.perplexity:.2f}")
