"""Artifacts of cubins: read as all are, checked against their plan, refused where no GPU is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from esper.errors import ArtifactCorrupt, ArtifactMismatch
from esper.kasmina.artifact import open_artifact, read_artifact
from esper.kasmina.launches import as_tuples
from esper.leyline.base import sha256
from esper.leyline.launch import Buffer, Plan
from tests.artifacts import members, pack
from tests.cubins import IR, SITE, low_rank_program, plan_and_code


def written(folder: Path, plan: Plan | None = None, **changes: Any) -> tuple[Path, str]:
    what = low_rank_program()
    sound, cubins = plan_and_code(what)
    code = {"plan.json": (plan or sound).model_dump_json().encode(), "kernels.cubin": cubins}
    fields = {"isa": "sm_80", "backward_inputs": what.backward_inputs,
              "gradients": what.gradients, **changes}
    content = pack(members(IR, SITE, code, **fields).items())
    path = folder / "cubins.esper"
    path.write_bytes(content)
    return path, sha256(content)


def test_both_readers_take_it_and_see_the_same(tmp_path: Path, extension: Any) -> None:
    path, digest = written(tmp_path)
    artifact, sealed = read_artifact(path, digest), extension.read_artifact(str(path), digest)
    assert sealed.members == ["manifest.json", "blueprint.json", "plan.json", "kernels.cubin"]
    assert dict(zip(sealed.members[2:], sealed.code, strict=True)) == artifact.code
    assert [sha256(c) for c in artifact.code.values()] == sealed.digests[1:]


def test_members_of_two_layouts_are_none(tmp_path: Path, extension: Any) -> None:
    _, cubins = plan_and_code(low_rank_program())
    for names in (("plan.json", "backward.so"), ("forward.so", "kernels.cubin"),
                  ("kernels.cubin", "plan.json")):
        content = pack(members(IR, SITE, dict.fromkeys(names, cubins), isa="sm_80").items())
        path = tmp_path / "mixed.esper"
        path.write_bytes(content)
        for reader in (read_artifact, lambda p, d: extension.read_artifact(str(p), d)):
            with pytest.raises(ArtifactCorrupt):
                reader(path, sha256(content))


def without_a_gpu() -> Any:
    return pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


@without_a_gpu()
def test_it_is_refused_where_no_gpu_is(tmp_path: Path) -> None:
    # tests.artifacts says that it is of this torch, so nothing but the device is wrong.
    with pytest.raises(ArtifactMismatch, match="made for a cuda device, this process sees none"):
        open_artifact(*written(tmp_path))


@without_a_gpu()
def test_cubins_are_not_loaded_where_no_gpu_is(tmp_path: Path, extension: Any) -> None:
    path, digest = written(tmp_path)
    what = low_rank_program()
    cache = extension.KernelCache(max_bytes=1 << 20, max_count=4)
    sealed = cache.read(str(path), digest).wait()
    plan = as_tuples(plan_and_code(what)[0])
    given = sealed, list(what.backward_inputs), list(what.gradients), "cuda", "float32"
    says = "sees no CUDA device" if extension.with_cuda else "built without CUDA"
    with pytest.raises(RuntimeError, match=says):
        cache.open(*given, plan=plan).wait()
    with pytest.raises(ValueError, match="no launch plan was given"):
        cache.open(*given).wait()


def test_without_the_extension_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from esper.kasmina import artifact

    monkeypatch.setattr(artifact, "kernel_cache", lambda: None)
    monkeypatch.setattr(artifact, "check_runs_here", lambda *_: None)
    with pytest.raises(ArtifactMismatch, match="launched by esper's extension with CUDA"):
        open_artifact(*written(tmp_path))


def changed(half: str, **fields: Any) -> Plan:
    plan, _ = plan_and_code(low_rank_program())
    return plan.model_copy(update={half: getattr(plan, half).model_copy(update=fields)})


def test_a_plan_that_does_not_fit_its_manifest_is_refused(tmp_path: Path) -> None:
    plan, _ = plan_and_code(low_rank_program())
    narrow = (Buffer(shape=(7,), rows=True, type="fp32"), *plan.forward.buffers[1:])
    backward = tuple(b.model_copy(update={"shape": (3, 3)}) for b in plan.backward.buffers)
    out = plan.forward.outputs[0]
    shortened = list(plan.forward.buffers)
    shortened[out] = narrow[0]
    for given, says in (
        ({"plan": changed("forward", buffers=tuple(shortened))}, "the output"),
        ({"plan": changed("backward", buffers=backward)}, "the gradients"),
        ({"plan": changed("backward", outputs=(plan.backward.outputs[0],))}, "does not have"),
        ({"plan": changed("forward", like_h=2)}, "input of the forward that is h"),
        ({"isa": "sm_90"}, "arch"),
        ({"gradients": (0, 1, 1)}, "the gradients"),
        ({"backward_inputs": ("grad",)}, "inputs of the backward"),
        ({"backward_inputs": ("grad", "out:9")}, "does not have"),
    ):
        with pytest.raises(ArtifactCorrupt, match=says):
            read_artifact(*written(tmp_path, **given))


@pytest.mark.parametrize(("place", "value", "says"), [
    ((1, 0), 9, "is to be like h"), ((1, 4), [40], "buffers is to be returned"),
    ((1, 3, 0, 0), 50, "there is no kernel"), ((1, 3, 0, 2), [], "arguments"),
    ((1, 3, 0, 2, 0), ("in", 90, (0, 1, 0)), "is tensor 90"),
    ((1, 3, 0, 2, 0), ("on", 0, (0, 1, 0)), "must be in, buf or number"),
    ((1, 3, 0, 1, 0), (1, 0, 0), "is not zero"), ((1, 2, 0, 2), "fp64", "must be fp32"),
    ((0, 0, 3), [8, 3], "must be 4 or 8"),
])
def test_the_extension_takes_no_plan_on_trust(
    extension: Any, place: tuple[int, ...], value: Any, says: str
) -> None:
    def altered(whole: Any, path: tuple[int, ...]) -> Any:
        if not path:
            return value
        return [altered(part, path[1:]) if i == path[0] else part for i, part in enumerate(whole)]

    what = low_rank_program()
    raw = altered(as_tuples(plan_and_code(what)[0]), place)
    with pytest.raises(ValueError, match=says):
        extension.SeedKernel.followed(raw, print, list(what.backward_inputs),
                                      list(what.gradients), "cpu", "float32")


def test_numbers_beyond_what_a_launch_can_hold_are_refused(extension: Any) -> None:
    what = low_rank_program()
    plan = as_tuples(plan_and_code(what)[0])
    launched: list[int] = []
    kernel = extension.SeedKernel.followed(
        plan, lambda k, grid, values: launched.append(k), list(what.backward_inputs),
        list(what.gradients), "cpu", "float32")
    params = [torch.zeros(shape) for shape in ((4, 8), (8, 4))]
    kernel(torch.zeros(3, 8), params, 0.5, 2)
    assert launched == [0, 1]
    kernel(torch.zeros(0, 8), params, 0.5, 2)
    assert launched == [0, 1], "no rows, no launches"
    kernels, forward, backward = plan
    launches = [(k, [(1 << 40, 1, 0), (0, 1, 1), (0, 1, 1)], a) for k, _, a in forward[3]]
    huge = forward[0], forward[1], forward[2], launches, forward[4]
    kernel = extension.SeedKernel.followed(
        (kernels, huge, backward), print, list(what.backward_inputs), list(what.gradients), "cpu",
        "float32")
    with pytest.raises(RuntimeError, match="use a smaller batch"):
        kernel(torch.zeros(3, 8), params, 0.5, 2)
