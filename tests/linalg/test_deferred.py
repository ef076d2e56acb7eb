"""Operations that are written down and done later are those that were asked for, in order."""

import threading

import pytest

from asteria.linalg.deferred import Program, do


def test_outside_of_a_program_it_is_done_at_once() -> None:
    done: list[int] = []
    do(done.append, 1)
    assert done == [1]


def test_a_program_is_done_in_order_when_it_is_run_and_once() -> None:
    done: list[int] = []
    program = Program()
    with program:
        do(done.append, 1)
        do(done.extend, [2, 3])
    with program:
        do(done.insert, 0, 4)
    assert done == []
    program.run()
    program.run()
    assert done == [4, 1, 2, 3]


def test_keywords_are_kept() -> None:
    found: dict[str, int] = {}
    program = Program()
    with program:
        do(found.update, one=1)
    program.run()
    assert found == {"one": 1}


def test_what_raises_leaves_nothing_of_itself_and_all_that_was_before() -> None:
    done: list[int] = []
    program = Program()
    with program:
        do(done.append, 1)
    with pytest.raises(KeyError), program:
        _do_and_fail(done)
    do(done.append, 3)  # nobody writes down any more
    program.run()
    assert done == [3, 1]


def _do_and_fail(done: list[int]) -> None:
    do(done.append, 2)
    raise KeyError


def test_an_operation_that_raises_ends_the_run_and_is_not_tried_again() -> None:
    done: list[int] = []
    program = Program()
    with program:
        do(done.remove, 5)
        do(done.append, 1)
    with pytest.raises(ValueError, match="not in list"):
        program.run()
    program.run()
    assert done == []


def test_an_interrupt_is_raised_when_all_is_done() -> None:
    done: list[int] = []
    program = Program()
    with program:
        do(done.append, 1)
        do(_interrupt)
        do(done.append, 2)
    with pytest.raises(KeyboardInterrupt):
        program.run()
    assert done == [1, 2]


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_operations_may_ask_for_others() -> None:
    done: list[int] = []
    program = Program()
    with program:
        do(do, done.append, 1)
    program.run()
    assert done == [1]


def test_other_threads_are_none_of_its_business() -> None:
    done: list[int] = []
    program = Program()
    with program:
        other = threading.Thread(target=do, args=(done.append, 1))
        other.start()
        other.join()
        assert done == [1]


def test_what_is_kept_can_be_asked_for_again_and_again() -> None:
    done: list[int] = []
    kept, program = Program(), Program()
    with kept:
        do(done.append, 1)
        do(done.extend, [2, 3])
    kept.again()
    assert done == [1, 2, 3]
    for _ in range(2):
        with program:
            kept.again()
            do(done.append, 4)
    assert done == [1, 2, 3]
    program.run()
    assert done == [1, 2, 3, *[1, 2, 3, 4] * 2]


def test_a_program_that_was_left_open_swallows_nothing_that_comes_later() -> None:
    done: list[int] = []
    program = Program()
    program.__enter__()
    do(done.append, 1)
    program.run()  # without __exit__, as an interrupt may have it
    do(done.append, 2)
    assert done == [1, 2]
