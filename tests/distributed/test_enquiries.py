"""A rank that is asked answers at any time."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from asteria.distributed.enquiries import Enquiries
from asteria.distributed.letters import Letter
from asteria.distributed.topology import Topology
from asteria.errors import CheckpointError
from tests.support.network import Network, posts


class Asked:
    """Two ranks, of which rank 1 serves."""

    def __init__(self) -> None:
        self.network = Network(2)
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.posts = posts(self.network, Topology.even(2, 2))
        self.ranks = [Enquiries(post, self.serve) for post in self.posts]
        for post in self.posts:
            post.open()
        self.stop = self.network.run()

    def serve(self, note: Mapping[str, Any]) -> Sequence[Tensor]:
        self.may_answer.wait()
        if "size" not in note:
            raise CheckpointError("rank 1 is at step 7, this is of step 6")
        return [torch.arange(note["size"], dtype=torch.float32)]


def test_questions_and_answers() -> None:
    asked = Asked()
    for size in (3, 5):
        (tensor,) = asked.ranks[0].ask(1, {"size": size}, "factor_0 of w")
        assert tensor is not None
        assert torch.equal(tensor, torch.arange(size, dtype=torch.float32))
    with pytest.raises(CheckpointError, match="factor_0 of w was asked of rank 1: rank 1 is at"):
        asked.ranks[0].ask(1, {}, "factor_0 of w")
    asked.stop()


def test_letters_arrive_while_an_answer_is_made() -> None:
    asked, arrived = Asked(), threading.Event()
    asked.may_answer.clear()
    asked.posts[1].on("basis", lambda *_: arrived.set())
    answers: list[Any] = []
    ask = asked.ranks[0].ask
    thread = threading.Thread(target=lambda: answers.extend(ask(1, {"size": 2}, "w")))
    thread.start()
    asked.posts[0].send(Letter("basis", 1, 0), [1])
    assert arrived.wait(10.0)
    assert not answers
    asked.may_answer.set()
    thread.join()
    assert len(answers) == 1
    asked.stop()
