"""Operations that are written down and done later are those that were asked for, in order."""

import threading

import pytest

from asteria.linalg.deferred import Program, do, run


def test_outside_of_a_program_it_is_done_at_once() -> None:
    done: list[int] = []
    do(done.append, 1)
    assert done == [1]


def test_programs_are_done_in_order_when_they_are_run_and_as_often() -> None:
    done: list[int] = []
    first, second = Program(), Program()
    with first:
        do(done.append, 1)
        do(done.extend, [2, 3])
    with second:
        do(done.insert, 0, 4)
    assert done == []
    run([first, second])
    assert done == [4, 1, 2, 3]
    run([second])
    assert done == [4, 4, 1, 2, 3]


def test_what_is_written_down_anew_takes_the_place_of_the_old() -> None:
    done: list[int] = []
    program = Program()
    for value in (1, 2):
        with program:
            do(done.append, value)
    assert len(program) == 1
    run([program])
    assert done == [2]


def test_keywords_are_kept() -> None:
    found: dict[str, int] = {}
    program = Program()
    with program:
        do(found.update, one=1)
    run([program])
    assert found == {"one": 1}


def test_what_raises_leaves_nothing() -> None:
    done: list[int] = []
    program = Program()
    with pytest.raises(KeyError), program:
        _do_and_fail(done)
    do(done.append, 3)  # nobody writes down any more
    run([program])
    assert done == [3]


def _do_and_fail(done: list[int]) -> None:
    do(done.append, 2)
    raise KeyError


def test_an_operation_that_raises_ends_the_run() -> None:
    done: list[int] = []
    program, other = Program(), Program()
    with program:
        do(done.append, 1)
        do(done.remove, 5)
        do(done.append, 2)
    with other:
        do(done.append, 3)
    with pytest.raises(ValueError, match="not in list"):
        run([program, other])
    assert done == [1]


def test_an_interrupt_is_raised_when_all_is_done() -> None:
    done: list[int] = []
    program, other = Program(), Program()
    with program:
        do(done.append, 1)
        do(_interrupt)
        do(done.append, 2)
    with other:
        do(done.append, 3)
    with pytest.raises(KeyboardInterrupt):
        run([program, other])
    assert done == [1, 2, 3]


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_operations_may_ask_for_others() -> None:
    done: list[int] = []
    program = Program()
    with program:
        do(do, done.append, 1)
    run([program])
    assert done == [1]


def test_other_threads_are_none_of_its_business() -> None:
    done: list[int] = []
    program = Program()
    with program:
        other = threading.Thread(target=do, args=(done.append, 1))
        other.start()
        other.join()
        assert done == [1]
