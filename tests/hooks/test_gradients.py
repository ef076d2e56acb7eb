"""Announcing final gradients."""

import gc
import weakref
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from asteria.hooks.gradients import GradientHooks


class Listener:
    def __init__(self) -> None:
        self.heard: Counter[int] = Counter()

    def hear(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.heard[id(parameter)] += 1


def watching(*params: Tensor) -> tuple[Listener, GradientHooks]:
    listener = Listener()
    hooks = GradientHooks(listener, Listener.hear)
    for p in params:
        hooks.watch(p)
    return listener, hooks


def test_once_for_each_backward_pass() -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    listener, hooks = watching(p, q)
    (p.sum() + q.sum()).backward()
    (2 * p).sum().backward()
    assert listener.heard == {id(p): 2, id(q): 1}
    assert hooks is not None


def test_once_for_a_parameter_that_is_used_twice() -> None:
    p = nn.Parameter(torch.ones(2))
    listener, hooks = watching(p)
    (p * p + p).sum().backward()
    assert listener.heard == {id(p): 1}
    assert hooks is not None


def test_watching_twice_is_watching_once() -> None:
    p = nn.Parameter(torch.ones(2))
    listener, hooks = watching(p, p)
    p.sum().backward()
    assert listener.heard == {id(p): 1}
    assert hooks is not None


def test_a_frozen_parameter_is_left_alone() -> None:
    p = nn.Parameter(torch.ones(2), requires_grad=False)
    listener, hooks = watching(p)
    assert not listener.heard
    assert hooks is not None


def test_nothing_after_unwatch() -> None:
    p = nn.Parameter(torch.ones(2))
    listener, hooks = watching(p)
    hooks.unwatch(p)
    hooks.unwatch(p)
    p.sum().backward()
    assert not listener.heard


@pytest.mark.parametrize("gone", ["hooks", "listener"])
def test_nothing_outlives_its_owner(gone: str) -> None:
    p = nn.Parameter(torch.ones(2))
    listener, hooks = watching(p)
    if gone == "hooks":
        del hooks
    else:
        reference = weakref.ref(listener)
        del listener
        gc.collect()
        assert reference() is None
    gc.collect()
    p.sum().backward()
    if gone == "hooks":
        assert not listener.heard
        assert not p._post_accumulate_grad_hooks


def test_the_hooks_keep_no_parameter_alive() -> None:
    p = nn.Parameter(torch.ones(2))
    _, hooks = watching(p)
    reference = weakref.ref(p)
    del p
    gc.collect()
    assert reference() is None
    assert hooks is not None
