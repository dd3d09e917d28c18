"""BlueprintIR: a small graph over a closed set of operations.

A blueprint describes one sub-network f with output shaped as its input `h`. Widths are
written in terms of the site's channels C; batch and space are symbolic. Nodes are listed
with inputs before users; the last word is `output`. Operations and nodes are in `ops`, the
canonical form and id in `canonical`, shapes and costs in `shapes`, the meaning in
`reference`.
"""

from __future__ import annotations

import json
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from esper.errors import BlueprintError
from esper.leyline.base import Contract
from esper.leyline.canonical import blueprint_id
from esper.leyline.ops import INPUT as INPUT
from esper.leyline.ops import SPECS as SPECS
from esper.leyline.ops import C as C
from esper.leyline.ops import Init as Init
from esper.leyline.ops import Node as Node
from esper.leyline.ops import Op as Op
from esper.leyline.ops import Width as Width
from esper.leyline.signature import SiteKind

IR_VERSION = 1  # BlueprintIR.version
MAX_NODES = 64
MAX_JSON_BYTES = 64 * 1024


class BlueprintIR(Contract):
    """A graph for one kind of site. Structure is checked here, shapes in `shapes.infer`.

    Raises (through pydantic): BlueprintError naming the node for an unknown op or input, a
    forward or repeated id, a node that does not reach the output, or too many nodes.
    """

    version: Literal[1] = 1
    kind: SiteKind
    name: str = Field(default="", max_length=80)  # for people; not part of the meaning
    nodes: tuple[Node, ...] = Field(min_length=1, max_length=MAX_NODES)
    output: str

    @model_validator(mode="after")
    def _well_formed(self) -> BlueprintIR:
        seen = {INPUT}
        for node in self.nodes:
            if node.id in seen:
                raise BlueprintError("the id is taken; ids must be unique", node.id)
            for source in node.inputs:
                if source not in seen:
                    raise BlueprintError(
                        f"input {source!r} is not {INPUT!r} and not listed before", node.id
                    )
            if self.kind not in SPECS[node.op].kinds:
                raise BlueprintError(f"{node.op} is not defined on {self.kind} sites", node.id)
            seen.add(node.id)
        if self.output not in seen:
            raise BlueprintError(f"output {self.output!r} is not a node")
        live = {self.output}
        for node in reversed(self.nodes):
            if node.id not in live:
                raise BlueprintError("does not reach the output; leave it out", node.id)
            live.update(node.inputs)
        return self

    @property
    def id(self) -> str:
        """Content id of the canonical form: equal for isomorphic spellings, name left out."""
        return blueprint_id(self.version, self.kind, self.nodes, self.output)

    def node(self, node_id: str) -> Node:
        return next(n for n in self.nodes if n.id == node_id)

    def to_json(self) -> str:
        return self.model_dump_json(exclude_none=True)


def parse_blueprint(text: str | bytes) -> BlueprintIR:
    """Read a blueprint's JSON form; the size is capped before anything is parsed.

    Raises:
        BlueprintError: too large, not JSON, of another version, or malformed.
    """
    if len(text) > MAX_JSON_BYTES:
        raise BlueprintError(
            f"a blueprint's JSON has at most {MAX_JSON_BYTES} bytes, this one {len(text)}"
        )
    try:
        return BlueprintIR.model_validate_json(text)
    except ValidationError as e:
        raise _refusal(e, text) from e


def _refusal(error: ValidationError, text: str | bytes) -> BlueprintError:
    """What pydantic says first, with the node that it speaks of."""
    first = error.errors()[0]
    place, cause, node = first["loc"], first.get("ctx", {}).get("error"), None
    if isinstance(cause, BlueprintError):
        return cause
    if len(place) > 1 and place[0] == "nodes" and isinstance(place[1], int):
        named_so = json.loads(text)["nodes"][place[1]]
        if isinstance(named_so, dict) and isinstance(named_so.get("id"), str):
            node = named_so["id"]
    where = ".".join(str(p) for p in place)
    return BlueprintError(f"{first['msg']}{f' (at {where})' if where else ''}", node)
