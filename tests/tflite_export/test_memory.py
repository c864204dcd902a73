"""The order in which ops run, by the bytes that it needs at once."""

import dataclasses
import random

import numpy as np
import pytest

import tflite_export
from tflite_export.memory import bytes_at_once, in_frugal_order, planned_bytes
from tflite_export.program import Op, Program, Tensor
from tflite_export.runtimes import run


def program_of(sizes, ops, outputs) -> Program:
    """A program of int8 vectors; "in" is its input and w a constant. Ops are given as (what it writes, what it reads)."""
    tensors = {name: Tensor(name, (1, size)) for name, size in sizes.items()}
    return Program(
        tensors | {"w": Tensor("w", (1000,), data=object())},
        [Op("ADD", list(reads), [writes]) for writes, reads in ops],
        {"x": "in"},
        {name: name for name in outputs},
    )


def alive_at_once(program) -> int:
    """The same as `bytes_at_once`, by looking at every op for all tensors that are needed then or later."""
    most, written = 0, set(program.inputs.values())
    for place, op in enumerate(program.ops):
        written |= set(op.outputs)
        later = {name for other in program.ops[place:] for name in other.inputs} | set(program.outputs.values())
        needed = written & (later | set(op.outputs))
        most = max(most, sum(program.tensors[name].shape[1] for name in needed))
    return most


BRANCHES = {"in": 10, "a": 100, "b": 100, "c": 100, "d": 10, "e": 10, "f": 10, "sum": 10}
CASES = {
    "a chain stays": ({"in": 5, "a": 7, "b": 3}, [("a", ["in", "w"]), ("b", ["a"])], ["b"], 12, 12),
    "branches one by one": (
        BRANCHES,
        [
            ("a", ["in"]),
            ("b", ["in"]),
            ("c", ["in"]),
            ("d", ["a"]),
            ("e", ["b"]),
            ("f", ["c"]),
            ("sum", ["d", "e", "f"]),
        ],
        ["sum"],
        310,
        130,
    ),
    "outputs stay alive": (
        BRANCHES,
        [("a", ["in"]), ("b", ["in"]), ("d", ["a"]), ("sum", ["b", "d"])],
        ["a", "sum"],
        220,
        220,
    ),
    "read twice by one op": ({"in": 5, "a": 7, "b": 3}, [("a", ["in"]), ("b", ["a", "a"])], ["b"], 12, 12),
    "nothing to run": ({"in": 5}, [], ["in"], 5, 5),
}


@pytest.mark.parametrize("sizes, ops, outputs, before, after", CASES.values(), ids=CASES)
def test_bytes(sizes, ops, outputs, before, after):
    program = program_of(sizes, ops, outputs)
    assert (bytes_at_once(program), bytes_at_once(in_frugal_order(program))) == (before, after)


@pytest.mark.parametrize("seed", range(40))
def test_never_worse_and_always_in_order(seed):
    """Random graphs, each op reading one to three of the tensors before it."""
    generator = random.Random(seed)
    sizes, ops = {"in": generator.randint(1, 100)}, []
    for number in range(generator.randint(2, 25)):
        reads = generator.choices(list(sizes), k=generator.randint(1, 3))
        ops.append((f"t{number}", reads))
        sizes[f"t{number}"] = generator.randint(1, 100)
    program = program_of(sizes, ops, [ops[-1][0], generator.choice(ops)[0]])
    frugal = in_frugal_order(program)
    frugal.check()
    assert sorted(map(id, frugal.ops)) == sorted(map(id, program.ops))
    assert bytes_at_once(frugal) <= planned_bytes(frugal) <= planned_bytes(program)
    for each in (program, frugal):
        assert bytes_at_once(each) == alive_at_once(each)
    assert in_frugal_order(dataclasses.replace(frugal, ops=frugal.ops[:])).ops == frugal.ops


def residual_program() -> Program:
    """Tensors of one size, some of which stay alive while others come and go."""
    names = [f"t{number}" for number in range(12)]
    tensors = {name: Tensor(name, (1, 4096), scale=(0.1,)) for name in ["in", *names]}
    reads = [
        ["in", "in"],
        ["t0", "in"],
        ["t1", "t1"],
        ["t2", "t1"],
        ["t3", "t3"],
        ["t4", "t4"],
        ["t5", "t3"],
        ["t6", "t6"],
    ]
    reads += [["t7", "t7"], ["t8", "t6"], ["t9", "t9"], ["t10", "t9"]]
    ops = [Op("ADD", inputs, [name]) for name, inputs in zip(names, reads, strict=True)]
    return Program(tensors, ops, {"x": "in"}, {"y": "t11"})


@pytest.mark.parametrize("seed", range(6))
def test_the_plan_is_that_of_tflm(seed):
    """Whatever the order of tensors in the file: what the arena grows by is what the plan does."""
    best = in_frugal_order(residual_program())
    names = list(best.tensors)
    random.Random(seed).shuffle(names)
    mixed = dataclasses.replace(best, tensors={name: best.tensors[name] for name in names})
    arenas = [
        run("tflm", tflite_export.write(each), [np.zeros((0, 4096), np.int8)]).arena_bytes for each in (best, mixed)
    ]
    assert arenas[1] - arenas[0] == planned_bytes(mixed) - planned_bytes(best)
    assert planned_bytes(best) == bytes_at_once(best)


def test_other_orders_of_tensors_need_more():
    best = in_frugal_order(residual_program())
    mixed = [
        dataclasses.replace(best, tensors=dict(random.Random(seed).sample(sorted(best.tensors.items()), 13)))
        for seed in range(20)
    ]
    assert max(planned_bytes(each) for each in mixed) > planned_bytes(best)
