"""The ordinary text of a run, from its policy: the halves of the retain text, and the neighbours with what the model
knows of them; knows no edit and no limit.
"""

from __future__ import annotations

from collections.abc import Sequence

from memscrub.errors import PolicyError
from memscrub.jobs.scanning import Inputs
from memscrub.locality.distance import RetainHalves, split_retain
from memscrub.measures.extraction import Sampling, score
from memscrub.models.model import LoadedModel
from memscrub.models.tokens import TokenText, check_ids
from memscrub.storage.untrusted_config import Encoding
from memscrub.texts.protected import load_texts


def retain_halves(inputs: Inputs) -> RetainHalves:
    """The policy's retain text, cut in halves. Raises PolicyError when there is not enough of it."""
    policy = inputs.policy
    halves = split_retain(
        inputs.loaded,
        load_texts(policy.retain_paths),
        load_texts(map(policy.resolve, policy.locality.statistics)),
        inputs.texts,
        max_tokens=policy.locality.max_tokens,
    )
    # A row of one token predicts nothing.
    if any(not len(half) or half.shape[1] < 2 for half in (halves.solver, halves.judge)):
        raise PolicyError(
            f"{policy.path}: the retain text is too short to be split into a half to solve with and a half to"
            " judge by; add ordinary text to the files that [locality] retain names."
        )
    return halves


def neighbour_texts(inputs: Inputs) -> tuple[TokenText, ...]:
    """The policy's neighbours as token ids, as much of each as the model reads at once."""
    documents = load_texts(map(inputs.policy.resolve, inputs.policy.locality.neighbours))
    prompt, room = inputs.loaded.prompt, inputs.loaded.max_positions
    tokenizer = inputs.loaded.tokenizer
    with Encoding():
        rows = [prompt + tuple(tokenizer(each.text, add_special_tokens=False)["input_ids"]) for each in documents]
    for row in rows:
        check_ids(inputs.loaded, row)
    return tuple(
        TokenText(f"neighbour-{index}", "neighbour", row[:room], len(prompt)) for index, row in enumerate(rows)
    )


def known_tokens(loaded: LoadedModel, texts: Sequence[TokenText]) -> list[list[bool]]:
    """Which tokens of each text greedy decoding emits, given all before them."""
    return [(scores.gap > 0).tolist() for scores in score(loaded, texts, lambda _: Sampling())]
