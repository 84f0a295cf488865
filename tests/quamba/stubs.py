"""Networks with other people's ways of being called. All are one small recurrence: `h = 0.7 h + E[id]`, logits `h W`."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace

import torch

VOCAB = 11
Output = namedtuple("Output", ["logits"])


class Memory:
    """A state: `h`, how often it was advanced, and how many tokens it has read."""

    def __init__(self):
        self.h, self.updates, self.read = None, 0, 0

    def get_seq_length(self):
        return self.read


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.embedding = torch.nn.Parameter(torch.randn(VOCAB, 8, generator=random))
        self.head = torch.nn.Parameter(torch.randn(8, VOCAB, generator=random))
        self.config = SimpleNamespace(vocab_size=VOCAB)
        self.forwards = 0
        self.asked = {}

    def run(self, ids, memory=None):
        """Logits `[N, L, V]`; memory goes on from where it was."""
        self.forwards += 1
        h = torch.zeros(len(ids), 8) if memory is None or memory.h is None else memory.h
        out = []
        for token in ids.unbind(1):
            h = 0.7 * h + self.embedding[token]
            out.append(h @ self.head)
        if memory is not None:
            memory.h, memory.updates, memory.read = h, memory.updates + 1, memory.read + ids.shape[1]
        return torch.stack(out, dim=1)


class LikeMambaSsm(Network):
    def forward(self, input_ids, position_ids=None, inference_params=None, num_last_tokens=0):
        self.asked = {"num_last_tokens": num_last_tokens}
        memory = Memory()
        if inference_params is not None:
            memory = inference_params.key_value_memory_dict.setdefault("memory", memory)
        return Output(self.run(input_ids, memory)[:, -num_last_tokens:])


class LikeTransformers(Network):
    def forward(self, input_ids, past_key_values=None, use_cache=None, logits_to_keep=0):
        self.asked = {"logits_to_keep": logits_to_keep, "use_cache": use_cache}
        return SimpleNamespace(
            logits=self.run(input_ids, past_key_values)[:, -logits_to_keep:], past_key_values=past_key_values
        )


class Older(Network):
    def forward(self, input_ids, num_logits_to_keep=0):
        return self.run(input_ids)[:, -num_logits_to_keep:], "something else"


class Neither(Network):
    def forward(self, tokens):
        return self.run(tokens)


class Flat(Network):
    def forward(self, tokens):
        return {"logits": self.run(tokens)[:, -1]}


class Swallowing(Network):
    """Takes any argument and heeds none."""

    def forward(self, input_ids, **kwargs):
        self.asked = kwargs
        return SimpleNamespace(logits=self.run(input_ids))


class Deaf(Network):
    """Names the argument and doesn't heed it."""

    def forward(self, input_ids, num_last_tokens=0, logits_to_keep=0):
        self.asked = {"num_last_tokens": num_last_tokens, "logits_to_keep": logits_to_keep}
        return Output(self.run(input_ids))


class Returning(Network):
    """Returns what it is told to."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, input_ids, logits_to_keep=0):
        return self.answer


class Forgetful(LikeTransformers):
    """Takes a state, and starts anew all the same."""

    def forward(self, input_ids, past_key_values=None, use_cache=None, logits_to_keep=0):
        return super().forward(input_ids, None, use_cache, logits_to_keep)


class Twice(LikeTransformers):
    """Lets every token into the state twice, and returns the first time's logits."""

    def forward(self, input_ids, past_key_values=None, use_cache=None, logits_to_keep=0):
        out = super().forward(input_ids, past_key_values, use_cache, logits_to_keep)
        if past_key_values is not None:
            self.run(input_ids, past_key_values)
        return out


class Foreseeing(Neither):
    """Every position reads the whole text."""

    def forward(self, tokens):
        return self.run(tokens) + self.run(tokens)[:, -1:]
