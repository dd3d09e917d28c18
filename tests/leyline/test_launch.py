"""Launch plans and cubins: what is read from them, and every way in which they may lie."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from esper.errors import ArtifactCorrupt
from esper.leyline.cubin import read_cubin
from esper.leyline.launch import Extent, Plan, check_cubins, parse_plan
from tests.cubins import cubin, low_rank_program, plan_and_code

SMALL = st.integers(0, 1 << 30)


@given(rows=st.integers(0, 1 << 40), times=SMALL, over=st.integers(1, 1 << 30), plus=SMALL)
def test_an_extent_is_what_it_says(rows: int, times: int, over: int, plus: int) -> None:
    value = Extent(times=times, over=over, plus=plus).at(rows)
    assert value == math.ceil(Fraction(rows * times, over)) + plus


@pytest.mark.parametrize(("abi", "sm"), [(7, 80), (7, 90), (8, 80), (8, 90)])
def test_a_cubin_says_what_it_is(abi: int, sm: int) -> None:
    found = read_cubin(cubin("add", [8, 4, 8, 4, 4, 8], abi=abi, sm=sm, registers=77, stack=16,
                             shared=1024, threads=256))
    assert (found.arch, found.name, found.threads) == (f"sm_{sm}", "add", 256)
    assert (found.registers, found.stack, found.shared) == (77, 16, 1024)
    assert found.parameters == (8, 4, 8, 4, 4, 8)


def test_a_damaged_cubin_is_refused_or_read_but_nothing_else() -> None:
    whole = cubin("add", [8, 4, 8])
    for broken in ({"machine": 62}, {"sections": 9}, {"sections": 60000}, {"at": 1 << 60},
                   {"at": len(whole) - 1}):
        with pytest.raises(ArtifactCorrupt):
            read_cubin(cubin("add", [8, 4, 8], **broken))
    for length in range(len(whole)):
        with pytest.raises(ArtifactCorrupt):
            read_cubin(whole[:length])
    rng = random.Random(0)
    for _ in range(2000):
        bent = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            bent[rng.randrange(len(bent))] = rng.randrange(256)
        try:
            read_cubin(bytes(bent))
        except ArtifactCorrupt:
            continue


def test_a_plan_comes_back_as_it_was() -> None:
    plan, cubins = plan_and_code(low_rank_program())
    assert parse_plan(plan.model_dump_json().encode(), cubins) == plan


@pytest.mark.parametrize(("changes", "says"), [
    ({"name": "other"}, "the plan says name other, its cubin"),
    ({"warps": 8}, "threads 256, its cubin 128"),
    ({"hidden": 1}, "sizes of parameters"),
    ({"registers": 31}, "registers 31, its cubin 32"),
    ({"stack": 8}, "bytes of stack 8, its cubin 0"),
    ({"shared": 163 * 1024 + 1}, "of shared memory, a block has at most 166912 on sm_80"),
    ({"offset": 1}, "is to be"),
    ({"bytes": 1 << 30}, "is to be"),
])
def test_a_plan_that_lies_of_its_code_is_refused(changes: dict[str, Any], says: str) -> None:
    plan, cubins = plan_and_code(low_rank_program())
    first = plan.kernels[0].model_copy(update=changes)
    with pytest.raises(ArtifactCorrupt, match=says):
        check_cubins(plan.model_copy(update={"kernels": (first, *plan.kernels[1:])}), cubins)


def test_code_of_another_arch_too_much_of_it_and_what_spills_is_refused() -> None:
    plan, cubins = plan_and_code(low_rank_program())
    with pytest.raises(ArtifactCorrupt, match="arch sm_90, its cubin sm_80"):
        check_cubins(plan.model_copy(update={"arch": "sm_90"}), cubins)
    with pytest.raises(ArtifactCorrupt, match="plans are made for sm_80, sm_90"):
        check_cubins(plan.model_copy(update={"arch": "sm_70"}), cubins)
    with pytest.raises(ArtifactCorrupt, match="1 bytes follow the last cubin"):
        check_cubins(plan, cubins + b"!")
    kernel = plan.kernels[0]
    for taken, says in (({"stack": 264}, "spills 264 bytes"),
                        ({"registers": 255, "threads": 1024}, "255 registers in each of 1024")):
        code = cubin(kernel.name, kernel.sizes, **taken)
        lying = kernel.model_copy(update={
            "bytes": len(code), "stack": taken.get("stack", 0),
            "registers": taken.get("registers", 32), "warps": taken.get("threads", 128) // 32})
        with pytest.raises(ArtifactCorrupt, match=says):
            check_cubins(plan.model_copy(update={"kernels": (lying,)}), code)


def broken(change: str) -> dict[str, Any]:
    plan, _ = plan_and_code(low_rank_program())
    raw: dict[str, Any] = plan.model_dump(mode="json")
    launch = raw["forward"]["launches"][0]
    match change:
        case "kernel":
            launch["kernel"] = len(raw["kernels"])
        case "tensor":
            launch["arguments"][0] = "buf:40"
        case "type":
            launch["arguments"][0] = "in:1"  # alpha is float32, but so is h: another type
            raw["forward"]["inputs"][1] = "bf16"
        case "count":
            launch["arguments"].pop()
        case "number":
            launch["arguments"][-1] = "in:0"
        case "output":
            raw["forward"]["outputs"] = [0, 0]
        case "like_h":
            raw["backward"]["like_h"] = 60
    return raw


@pytest.mark.parametrize(("change", "says"), [
    ("kernel", "there is no kernel"), ("tensor", "there is no buf:40"), ("type", "is given"),
    ("count", "is given"), ("number", "is given"), ("output", "not distinct buffers"),
    ("like_h", "is to be like h"),
])
def test_a_plan_that_contradicts_itself_is_refused(change: str, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Plan.model_validate(broken(change))
