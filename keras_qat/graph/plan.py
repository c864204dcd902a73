"""Which tensors get a range, which share one, and which ranges can be moved to where all kernels round alike."""

import dataclasses

from keras_qat.graph.walk import Graph, is_index, key_of, nodes_of, producers_of
from keras_qat.layers import Quantized
from keras_qat.operations import GONE, row_of
from keras_qat.primitives import Clamp

Limits = tuple[float, float]

_FEW_SUMS = 24
SHARING = ("same", "rounded", "joined")  # kinds of operations whose result is on the grid of their inputs


@dataclasses.dataclass
class Site:
    """A tensor of the integer graph whose values are put on its grid.

    Args:
        name: Of the operation behind which it stands.
        kind: "observed", "fixed", or "rounded" (on the grid of its group, without a say in it).
        limits: The range, if it is fixed.
        bits: Of its integers.
        rounding: How values come to the grid (see `FakeQuant.call`); "product" of those that its group's range is moved for.
        nonnegative: Its values are known to be ≥ 0.
        is_output: It is an output of the model.
        group: Number of the group of tensors that share its grid.
        index: Its place among those that find the group's range.
    """

    name: str
    kind: str = "observed"
    limits: Limits | None = None
    bits: int = 8
    rounding: str = "half_up"
    nonnegative: bool = False
    is_output: bool = False
    group: int = -1
    index: int = 0


@dataclasses.dataclass
class Plan:
    """What `plan` decides.

    Args:
        kinds: Node id → its row's range kind.
        sites: Tensor id → the site behind it.
        roots: Tensor id → id of the tensor that it is in the file, where operations of training in between are gone.
        moved: Root's id → a second site: a fixed range that joins a group of another grid.
        fused: Ids of the nodes whose activation is fused into the op in front.
        behind: Tensor id → the site of the activation that is fused behind it.
        groups: The sites of each group.
        products: The groups whose range can be moved to where all kernels round products alike: a node that writes one, and
            the groups that it reads.
        mixed: Those of them that other tensors share: operations in front of the product may have to know their grid.
        sums: The groups whose range can be moved to where all kernels add alike: for each sum its sign and the groups of
            its terms.
    """

    kinds: dict[int, str] = dataclasses.field(default_factory=dict)
    sites: dict[int, Site] = dataclasses.field(default_factory=dict)
    roots: dict[int, int] = dataclasses.field(default_factory=dict)
    moved: dict[int, Site] = dataclasses.field(default_factory=dict)
    fused: set[int] = dataclasses.field(default_factory=set)
    behind: dict[int, Site] = dataclasses.field(default_factory=dict)
    groups: list[list[Site]] = dataclasses.field(default_factory=list)
    products: dict[int, tuple[object, list[int]]] = dataclasses.field(default_factory=dict)
    mixed: set[int] = dataclasses.field(default_factory=set)
    sums: dict[int, list[tuple[int, int, int]]] = dataclasses.field(default_factory=dict)


def row_of_node(node):
    """The table's row of a node; of the layer inside where it is wrapped."""
    operation = node.operation
    return row_of(operation.layer if isinstance(operation, Quantized) else operation)


class _Flow:
    """The graph as the integers see it: training-only layers are gone, a tensor behind one is the one before it."""

    def __init__(self, model):
        self.model, self.nodes, self.producers = model, nodes_of(model), producers_of(model)
        self.kinds = {id(node): row_of_node(node).range_kind(node) for node in self.nodes}
        self.root = {id(tensor): tensor for tensor in model.inputs}
        self.readers: dict[int, int] = {}
        self.on_grid: set[int] = set()  # ids of the tensors that an integer op reads, or nothing but the outside world
        self.bits = {id(tensor): 8 for tensor in model.inputs}
        in_float: set[int] = set()
        for node in self.nodes:
            self.bits.update(dict.fromkeys(map(id, node.outputs), self._bits_of_result(node)))
            is_gone = self.kinds[id(node)] in GONE
            for tensor in node.outputs:
                self.root[id(tensor)] = self.root[id(node.input_tensors[0])] if is_gone else tensor
            if not is_gone and self.kinds[id(node)] != "constant":
                self._count(node.input_tensors)
                is_float = self.kinds[id(node)] == "float"
                (in_float if is_float else self.on_grid).update(id(self.root[id(x)]) for x in node.input_tensors)
        self.on_grid.update({id(tensor) for tensor in model.inputs} - in_float)
        self._count(model.outputs)

    def _bits_of_result(self, node) -> int:
        """Layers with weights write what they read, 16 bits for 16 bits; so does all that keeps to a grid."""
        row, kind = row_of_node(node), self.kinds[id(node)]
        keeps = kind in (*SHARING, *GONE, "clamp") or isinstance(node.operation, Quantized)
        read = next((x for x in node.input_tensors if not is_index(x)), node.input_tensors[0])
        return max(self.bits[id(read)] if keeps else 0, row.bits)

    def _count(self, tensors):
        for tensor in tensors:
            key = id(self.root[id(tensor)])
            self.readers[key] = self.readers.get(key, 0) + 1

    def sources(self, node) -> list[int]:
        return [id(self.root[id(tensor)]) for tensor in node.input_tensors if not is_index(tensor)]

    def fuses(self, node) -> bool:
        """Whether the op in front takes this relu in: TFLite can, and nothing else reads that op's result."""
        (source,) = self.sources(node)
        producer = self.producers.get(source)
        if producer is None or self.readers[source] != 1:
            return False
        has_no_op = row_of_node(node).activation is None  # the end of its grid is all there is to it
        return row_of_node(producer).fuses or (has_no_op and self.kinds[id(producer)] == "own")

    def behind_augmentation(self, tensor):
        """The last of the training-only layers that alone read an input: training is to see what they make of it."""
        while True:
            found = [node for node in self.nodes if any(x is tensor for x in node.input_tensors)]
            if len(found) != 1 or self.kinds[id(found[0])] != "train":
                return tensor
            tensor = found[0].outputs[0]


class _Groups:
    """Tensors that must share one grid (union-find on tensor ids)."""

    def __init__(self):
        self._parent: dict[int, int] = {}

    def find(self, key: int) -> int:
        self._parent.setdefault(key, key)
        while self._parent[key] != key:
            self._parent[key] = self._parent[self._parent[key]]
            key = self._parent[key]
        return key

    def join(self, one: int, other: int) -> None:
        self._parent[self.find(one)] = self.find(other)


def plan(model: Graph, input_ranges: dict[str, Limits]) -> Plan:
    """Decides where ranges go and which tensors share one.

    Args:
        model: A fused graph (see fuse.py).
        input_ranges: What is known of the inputs, by name.
    """
    flow, groups, first_tied = _Flow(model), _Groups(), {}
    result = Plan(kinds=flow.kinds, roots={key: id(root) for key, root in flow.root.items()})
    for tensor in model.inputs:
        name = tensor._keras_history.operation.name
        limits = input_ranges.get(name)
        if is_index(tensor):
            continue
        if id(tensor) not in flow.on_grid:
            continue
        place = flow.behind_augmentation(tensor)
        result.sites[id(place)] = Site(name, "fixed" if limits else "observed", limits)
    for node in flow.nodes:
        kind, output = flow.kinds[id(node)], id(node.outputs[0])
        if kind in SHARING:
            for source in flow.sources(node):
                groups.join(source, output)
        if kind == "tied":
            (source,) = flow.sources(node)
            groups.join(source, first_tied.setdefault(id(node.operation), source))
        if kind == "float" and output in flow.on_grid:
            result.sites[output] = Site(node.operation.name)
        if kind not in ("same", "index", "float", *GONE):
            result.sites[output] = dataclasses.replace(_site(node, kind), bits=flow.bits[output])
        if kind == "clamp" and flow.fuses(node):
            (source,) = flow.sources(node)
            del result.sites[source]
            result.fused.add(id(node))
            result.behind[source] = result.sites[output]
    for tensor in model.outputs:
        site = result.sites.get(id(flow.root[id(tensor)]))
        if site is not None:
            site.is_output = True
    if not result.sites and "float" in flow.kinds.values():
        raise ValueError(
            "Nothing of the model is left to quantize: its rules leave every layer in float. Expected a rule with None "
            "to match some layers only."
        )
    read_on_one_grid = {key for node in flow.nodes if flow.kinds[id(node)] in SHARING for key in flow.sources(node)}
    _form_groups(result, lambda key: groups.find(result.roots[key]), read_on_one_grid)
    group_of = {groups.find(id(flow.root[key])): site.group for key, site in result.sites.items()}
    group_of.update({key: site.group for key, site in result.sites.items()})
    sources = {
        id(node): [group_of.get(key, group_of.get(groups.find(key))) for key in flow.sources(node)]
        for node in flow.nodes
    }
    _find_products(result, flow, sources)
    _find_sums(result, flow, sources)
    _without_circles(result)
    return result


def _site(node, kind: str) -> Site:
    row = row_of_node(node)
    if isinstance(node.operation, Clamp):
        return Site(node.operation.name, "fixed", (node.operation.low, node.operation.high))
    if kind == "clamp":
        highest = getattr(node.operation, "max_value", None)
        if highest:
            return Site(node.operation.name, "fixed", (0.0, float(highest)))
        return Site(node.operation.name, nonnegative=row.activation is not None)
    if kind == "rounded":
        return Site(node.operation.name, kind, rounding=row.ties(node))
    return Site(node.operation.name, kind if kind == "fixed" else "observed", row.limits)


def _form_groups(result: Plan, leader_of, read_on_one_grid: set[int]) -> None:
    """Gives every site its group and its place there.

    A fixed range cannot be stretched. Where tensors with such ranges meet others in one group, they keep their range for
    all other readers and get a second site, in the group, for the ones that need it.
    """
    members: dict[int, list[int]] = {}
    for key in result.sites:
        members.setdefault(leader_of(key), []).append(key)
    for keys in members.values():
        sites = [result.sites[key] for key in keys]
        finding = finders(sites)
        if len({site.limits for site in finding}) > 1:
            for key in keys:
                site = result.sites[key]
                if site.kind == "fixed" and result.roots[key] not in read_on_one_grid:
                    sites = [other for other in sites if other is not site]
                    _add_group(result, [site])
                elif site.kind == "fixed":
                    second = Site(f"{site.name}.requantized", nonnegative=site.limits[0] == 0)
                    result.moved[result.roots[key]] = second
                    sites = [second if other is site else other for other in sites]
                    _add_group(result, [site])
        _add_group(result, sites)


def _find_products(result: Plan, flow: _Flow, sources: dict[int, list]) -> None:
    """The groups with products of tensors on the same grids; where there are several kinds in one, the first kind counts.

    A mean joins in where it is alone: it would make the grid of others up to twice as coarse.
    """
    limits = {site.group: site.limits for sites in result.groups for site in finders(sites)}
    written: dict[
        int, dict[str, list]
    ] = {}  # group → what its tensors are products of → their sites, each with its node
    for node in flow.nodes:
        behind = result.behind.get(id(node.outputs[0]))
        site = behind or result.sites.get(id(node.outputs[0]))
        if flow.kinds[id(node)] == "constant" and site is not None and site.group in written:
            continue  # it comes to the grid of the products before it
        if behind or (site is not None and site.kind == "observed" and id(node) not in result.fused):
            grids = [limits.get(group) or group for group in sources[id(node)]]
            factors = row_of_node(node).factors(node, grids)
            written.setdefault(site.group, {}).setdefault(repr(factors), []).append((site, node, factors))
    inputs = [result.sites.get(id(flow.behind_augmentation(tensor))) for tensor in flow.model.inputs]
    for group in {site.group for site in inputs if site is not None}:
        written.pop(group, None)
    for group, kinds in written.items():
        is_mixed = len(kinds) > 1
        if is_mixed:
            kinds = {key: of for key, of in kinds.items() if key != "None" and "count" not in of[0][2]}
        if kinds and "None" not in kinds and not (is_mixed and not _can_be_moved(result.groups[group])):
            products = next(iter(kinds.values()))
            read = sources[id(products[0][1])]
            if is_mixed and (group in read or None in read):
                continue
            result.products[group] = products[0][1], read
            result.mixed.update([group] if is_mixed else ())
            for site, *_ in products:
                site.rounding = "product"


def _can_be_moved(sites: list[Site]) -> bool:
    return all(site.kind != "fixed" and site.bits == 8 for site in sites)


def _find_sums(result: Plan, flow: _Flow, sources: dict[int, list]) -> None:
    """The sums of each group whose range may be made wider. Not of vectors where they are many: an unrolled recurrent layer
    has hundreds, and each range takes time to move."""
    sums = [node for node in flow.nodes if key_of(node.operation) == "Sum"]
    vectors = [node for node in sums if len(node.outputs[0].shape) < 3]
    for node in sums:
        terms = sources[id(node)]
        site = result.behind.get(id(node.outputs[0])) or result.sites.get(id(node.outputs[0]))
        is_one_of_many = len(node.outputs[0].shape) < 3 and len(vectors) > _FEW_SUMS
        can_be_moved = site.group not in result.products and _can_be_moved(result.groups[site.group])
        if can_be_moved and not is_one_of_many and None not in terms:
            added = (node.operation.sign, *terms)
            if added not in result.sums.setdefault(site.group, []):
                result.sums[site.group].append(added)


def _without_circles(result: Plan) -> None:
    """Leaves out what depends on its own grid by way of others': sums (whose terms may be on the same grid), and products on
    grids that others share."""
    is_known: dict[int, bool] = {}  # group → its grid can be known beforehand; False while that is being looked at

    def can_be_known(group) -> bool:
        if group in is_known:
            return is_known[group]
        is_known[group] = False
        if group in result.sums:
            terms = result.sums.pop(group)
            kept = [added for added in terms if all([x == group or can_be_known(x) for x in added[1:]])]
            result.sums.update({group: kept} if kept else {})
        elif group in result.products and not all([can_be_known(x) for x in result.products[group][1]]):
            if group not in result.mixed:
                return False
            del result.products[group]
            result.mixed.remove(group)
            for site in result.groups[group]:
                site.rounding = "half_up" if site.rounding == "product" else site.rounding
        is_known[group] = True
        return True

    for group in [*result.sums, *result.mixed]:
        can_be_known(group)


def finders(sites: list[Site]) -> list[Site]:
    """Those that have a say in the group's range."""
    return [site for site in sites if site.kind in ("observed", "fixed")]


def _add_group(result: Plan, sites: list[Site]) -> None:
    finding = finders(sites)
    for site in sites:
        site.group = len(result.groups)
        site.index = next((index for index, found in enumerate(finding) if found is site), 0)
    result.groups.append(sites)
