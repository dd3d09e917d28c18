"""The launch plan of a kernel that is made of cubins: what is run, on what, in which order.

A plan has two halves, as every kernel has: the forward takes `[h, alpha, *params]` and returns
`[out, *saved]`, the backward takes what the manifest's `backward_inputs` name. A half first
allocates its buffers, then launches kernels one after another on one stream, then returns some
of the buffers. All its tensors are contiguous. The only size that is not known when it is
compiled is the number of `rows`: the product of all extents of h but the last.

The plan is the member `plan.json`; the machine code is in `kernels.cubin`, one cubin behind
another.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from esper.errors import ArtifactCorrupt
from esper.leyline.base import Contract, first_fault
from esper.leyline.cubin import read_cubin
from esper.leyline.signature import DType

ALIGNMENT = 16
"""Bytes that every address which is passed to a kernel is a multiple of: it is compiled so."""

# Dynamic shared memory that one block may ask for, by the CUDA C++ programming guide's table of
# compute capabilities. These are the archs that plans are made for.
SHARED_LIMITS = {"sm_80": 163 << 10, "sm_90": 227 << 10}
MAX_REGISTERS = 65536  # of one block, on both
MAX_STACK = 256  # bytes that a thread may spill; more means that its tiles are wrong
_SIZES = {"i32": 4, "i64": 8}

TYPES = {DType.FLOAT32: "fp32", DType.BFLOAT16: "bf16", DType.FLOAT16: "fp16"}
"""Triton's names of the element types that a plan's tensors can have."""

Element = Annotated[str, Field(pattern=r"^(fp32|bf16|fp16)$")]
Index = Annotated[int, Field(ge=0, lt=64)]
Type = Annotated[str, Field(pattern=r"^(i32|i64|\*(fp32|bf16|fp16))$")]
Source = Annotated[str, Field(pattern=r"^(in|buf):(0|[1-9][0-9]{0,4})$")]


class Extent(Contract):
    """A number that depends on the rows: ceil(rows * times / over) + plus."""

    times: int = Field(default=0, ge=0, lt=1 << 31)
    over: int = Field(default=1, ge=1, lt=1 << 31)
    plus: int = Field(default=0, ge=0, lt=1 << 31)

    def at(self, rows: int) -> int:
        return -(-rows * self.times // self.over) + self.plus


class CubinKernel(Contract):
    """One kernel: `bytes` of `kernels.cubin` from `offset` on. `parameters` are the types of what
    it is given, by Triton's names, an asterisk before those that are addresses. After them it
    takes `hidden` addresses of Triton's own, which are null. `shared` is the dynamic shared
    memory of a launch in bytes; `registers` and `stack` are those of a thread, the latter in
    bytes and 0 where nothing is spilled."""

    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")
    offset: int = Field(ge=0)
    bytes: int = Field(ge=1)
    parameters: tuple[Type, ...] = Field(max_length=64)
    hidden: int = Field(ge=0, le=4)
    warps: Literal[1, 2, 4, 8, 16, 32]
    shared: int = Field(ge=0)
    registers: int = Field(ge=1)
    stack: int = Field(ge=0)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of all that is passed, in bytes."""
        return (*(_SIZES.get(t, 8) for t in self.parameters), *(8,) * self.hidden)


class Buffer(Contract):
    """A tensor that a half allocates: [*shape], or with `rows` the leading extents of h before
    it. Its elements are of `type`."""

    shape: tuple[int, ...] = Field(max_length=4)
    rows: bool = False
    type: Element


class Launch(Contract):
    """One launch: `kernel` is its index; an argument is "in:I", the half's I-th input, "buf:K",
    its K-th buffer, or a number. Where the grid is empty nothing is launched."""

    kernel: Index
    grid: tuple[Extent, Extent, Extent]
    arguments: tuple[Source | Extent, ...] = Field(max_length=64)


class Half(Contract):
    """`inputs` are the types of the input tensors' elements; `like_h` is the index of one that is
    shaped as h is; `outputs` are indices of buffers."""

    inputs: tuple[Element, ...]
    like_h: int = Field(ge=0)
    buffers: tuple[Buffer, ...] = Field(max_length=64)
    launches: tuple[Launch, ...] = Field(max_length=64)
    outputs: tuple[Index, ...] = Field(min_length=1, max_length=64)

    def type_of(self, source: str) -> str:
        """The element type behind "in:I" or "buf:K". Raises IndexError where there is none."""
        kind, _, index = source.partition(":")
        return self.inputs[int(index)] if kind == "in" else self.buffers[int(index)].type


class Plan(Contract):
    """Both halves and their kernels. Consistent in itself once it has been made."""

    version: Literal[1] = 1
    arch: str
    kernels: tuple[CubinKernel, ...] = Field(min_length=1, max_length=64)
    forward: Half
    backward: Half

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        for name, half in (("forward", self.forward), ("backward", self.backward)):
            if half.like_h >= len(half.inputs):
                raise ValueError(f"{name}: input {half.like_h} is to be like h, and is none")
            if len(set(half.outputs)) != len(half.outputs) or (
                    max(half.outputs) >= len(half.buffers)):
                raise ValueError(f"{name}: the outputs {half.outputs} are not distinct buffers")
            for number, launch in enumerate(half.launches):
                self._fits(f"{name}, launch {number}", half, launch)
        return self

    def _fits(self, where: str, half: Half, launch: Launch) -> None:
        if launch.kernel >= len(self.kernels):
            raise ValueError(f"{where}: there is no kernel {launch.kernel}")
        kernel = self.kernels[launch.kernel]
        given = []
        for argument in launch.arguments:
            if isinstance(argument, Extent):
                given.append("a number")
                continue
            try:
                given.append(f"*{half.type_of(argument)}")
            except IndexError:
                raise ValueError(f"{where}: there is no {argument}") from None
        wanted = ["a number" if t in _SIZES else t for t in kernel.parameters]
        if given != wanted:
            raise ValueError(f"{where}: {kernel.name} is given {given}, it takes {wanted}")


def parse_plan(text: bytes, cubins: bytes) -> Plan:
    """Read `plan.json` and compare it with the machine code it speaks of.

    Raises:
        ArtifactCorrupt: it is no plan, contradicts itself, or the code is not what it says.
    """
    try:
        plan = Plan.model_validate_json(text, strict=True)
    except ValidationError as e:
        raise ArtifactCorrupt(f"the launch plan: {first_fault(e)}") from e
    check_cubins(plan, cubins)
    return plan


def check_cubins(plan: Plan, cubins: bytes) -> None:
    """Compare what `plan` says of its kernels with the cubins themselves.

    Raises:
        ArtifactCorrupt: there is no such kernel in them, it is for another arch, takes other
            parameters or more of a GPU than the plan says or the arch has.
    """
    limit = SHARED_LIMITS.get(plan.arch)
    if limit is None:
        raise ArtifactCorrupt(
            f"the launch plan is for {plan.arch}; plans are made for {', '.join(SHARED_LIMITS)}"
        )
    end = 0
    for kernel in plan.kernels:
        if kernel.offset != end or end + kernel.bytes > len(cubins):
            raise ArtifactCorrupt(
                f"{kernel.name} is to be {kernel.bytes} bytes from {kernel.offset} on; the one "
                f"before ends at {end}, and there are {len(cubins)}"
            )
        end += kernel.bytes
        found = read_cubin(cubins[kernel.offset : end])
        for what, said, seen in (
            ("name", kernel.name, found.name), ("arch", plan.arch, found.arch),
            ("threads", 32 * kernel.warps, found.threads),
            ("sizes of parameters", kernel.sizes, found.parameters),
            ("registers", kernel.registers, found.registers),
            ("bytes of stack", kernel.stack, found.stack),
        ):
            if said != seen:
                raise ArtifactCorrupt(
                    f"kernel {kernel.name}: the plan says {what} {said}, its cubin {seen}"
                )
        if kernel.shared + found.shared > limit:
            raise ArtifactCorrupt(
                f"kernel {kernel.name} asks for {kernel.shared + found.shared} bytes of shared "
                f"memory, a block has at most {limit} on {plan.arch}"
            )
        if found.stack > MAX_STACK:
            raise ArtifactCorrupt(
                f"kernel {kernel.name} spills {found.stack} bytes in each thread, {MAX_STACK} are "
                "allowed; compile it with smaller tiles"
            )
        if found.registers * found.threads > MAX_REGISTERS:
            raise ArtifactCorrupt(
                f"kernel {kernel.name} asks for {found.registers} registers in each of "
                f"{found.threads} threads, a block has {MAX_REGISTERS} in all"
            )
    if end != len(cubins):
        raise ArtifactCorrupt(f"{len(cubins) - end} bytes follow the last cubin")
