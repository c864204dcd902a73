"""Puts FakeQuants where `plan` wants ranges."""

import keras
from keras import tree

from keras_qat.graph.plan import SHARING, Plan, Site, finders, row_of_node
from keras_qat.graph.walk import Graph, Reused, connect, fresh_inputs, is_index, rebuild
from keras_qat.layers import FakeQuant, GridLayer, Quantized, Rescale
from keras_qat.primitives import Clamp, Pointwise
from keras_qat.quantizers import Fixed, MovingAverage
from tflite_export.program import unique_name


def annotate(model: Graph, decided: Plan) -> Graph:
    """Puts a FakeQuant where the plan has a site: fused graph → that of the QAT model."""
    return _Annotator(decided).rebuilt(model)


class _Annotator:
    """Rebuilds a graph with FakeQuants. Scales are tensors of the graph too: grid layers take them as arguments."""

    def __init__(self, decided: Plan):
        self.plan = decided
        self.fake_quants = _fake_quants(decided.groups)
        self.reused = Reused()
        self.scale_of: dict[int, object] = {}  # id of a new tensor → the scale of its grid
        self.seconds: dict[int, object] = {}  # a root's id → its value on the grid of its second site
        self.options: dict[int, dict] = {}  # group → what its range is moved by
        self.grids: dict[int, tuple] = {}  # group → what a peek at its grid returns

    def rebuilt(self, model: Graph) -> Graph:
        inputs = fresh_inputs(model)
        self.given = {
            id(tensor) for tensor in tree.flatten(inputs)
        }  # tensors whose integers the file holds or is given
        begun = [self._behind(old, new) for old, new in zip(model.inputs, tree.flatten(inputs), strict=True)]
        return Graph(inputs, rebuild(model, self._visit, begun), model.name)

    def _visit(self, node, args, kwargs):
        args, kwargs = self._moved(node, args, kwargs)
        sources = [x for x in tree.flatten((args, kwargs)) if isinstance(x, keras.KerasTensor) and not is_index(x)]
        scales = [self.scale_of.get(id(x)) for x in sources]
        site = self.plan.behind.get(id(node.outputs[0])) or self.plan.sites.get(id(node.outputs[0]))
        if site is not None and site.group in self.plan.products and site.group not in self.plan.mixed:
            self.options.setdefault(site.group, row_of_node(node).factors(node, scales))
        if self._comes_from_another_grid(node, site):
            # A Clamp's grid ends where it does, but calibration and the time before quantization know no grids. RELU rounds
            # twice where its result has the longer steps, which happens where others share its grid.
            result = Rescale(name=f"{node.operation.name}.copy")(args[0], scales[0], self._scale_at(site, args[0]))
            result = self.reused.call(node, (result,), {})
        elif isinstance(node.operation, GridLayer):
            if isinstance(node.operation, Quantized):
                node.operation.wide = site.bits == 16
            count = node.operation.operands
            grids = (*scales[:count], self._scale_at(site, args[0]))
            result = self.reused.call(node, (*args[:count], *grids), kwargs)
        else:
            result = self.reused.call(node, args, kwargs)
        self.scale_of[id(result)] = next(iter(scales), None)
        if isinstance(node.operation, Pointwise) or self.plan.kinds[id(node)] == "constant":
            self.given.add(id(result))
        return self._behind(node.outputs[0], result)

    def _comes_from_another_grid(self, node, site) -> bool:
        if self.plan.kinds[id(node)] != "clamp" or id(node) in self.plan.fused:
            return False
        others = [other for other in self.plan.groups[site.group] if other is not site and other.kind != "rounded"]
        return isinstance(node.operation, Clamp) or (row_of_node(node).activation is not None and bool(others))

    def _scale_at(self, site: Site, x):
        """The scale of a site's grid, before its tensor is there."""
        if site.group in self.plan.sums or site.group in self.plan.products:
            return self._grid(site.group, x)[1]
        return self._fake_quant(site.group, x, {"peek": True})[1]

    def _grid(self, group: int, x):
        """What inference can know of a group's grid before any of its tensors is there (see `FakeQuant.call`)."""
        if group not in self.grids:
            options = {}
            if group in self.plan.products:
                options = self._factors(group, x)
            elif group in self.plan.sums:
                sums = self.plan.sums[group]
                terms = [None if term == group else self._grid(term, x) for _, *both in sums for term in both]
                options = {"terms": terms, "signs": tuple(sign for sign, *_ in sums)}
            self.grids[group] = self._fake_quant(group, x, {"peek": True, **options})
        return self.grids[group]

    def _factors(self, group: int, x) -> dict:
        """What its tensor is a product of, before any of them is there."""
        node, sources = self.plan.products[group]
        return row_of_node(node).factors(node, [self._grid(source, x)[1] for source in sources])

    def _behind(self, old, new):
        """The new tensor, on its grid if the plan wants one there."""
        site = self.plan.sites.get(id(old))
        return new if site is None else self._on_grid(new, site)

    def _on_grid(self, tensor, site: Site):
        options = {} if site.rounding == "half_up" else {"rounding": site.rounding}
        if site.kind == "rounded":
            options["observe"] = False
        if site.group in self.plan.mixed and site.group not in self.options:
            self.options[site.group] = self._factors(site.group, tensor)
        if id(tensor) in self.given:
            options["rounding"] = "precise"
        options = {**options, **self.options.get(site.group, {})}
        if site.group in self.plan.sums:
            options["stretch"] = self._grid(site.group, tensor)[0]
        value, scale = self._fake_quant(site.group, tensor, {"site": site.index, **options})
        self.scale_of[id(value)] = scale
        return value

    def _fake_quant(self, group: int, x, options):
        """Calls the layer that finds a group's range: the value on its grid, and the grid's scale."""
        layer = self.fake_quants[group]
        if not layer.built:
            layer.build(x.shape)
        return connect(layer, (x,), options, layer.compute_output_spec(x, **options))

    def _moved(self, node, args, kwargs):
        """The arguments, those of another grid brought to that of the node's group."""
        if self.plan.kinds[id(node)] not in SHARING:
            return args, kwargs
        olds = iter(node.input_tensors)

        def move(value):
            return self._second(next(olds), value) if isinstance(value, keras.KerasTensor) else value

        return tree.map_structure(move, (args, kwargs))

    def _second(self, old, value):
        root = self.plan.roots[id(old)]
        site = self.plan.moved.get(root)
        if site is None:
            return value
        if root not in self.seconds:
            scaled = Rescale(name=site.name)(value, self.scale_of[id(value)], self._scale_at(site, value))
            self.seconds[root] = self._on_grid(scaled, site)
        return self.seconds[root]


def _fake_quants(groups: list[list[Site]]) -> list[FakeQuant]:
    """One layer for each group, named after its first tensor; numbered where a shared layer makes several tensors."""
    layers: dict[str, FakeQuant] = {}
    for sites in groups:
        layer = _fake_quant(sites)
        layer.name = unique_name(layer.name, layers)
        layers[layer.name] = layer
    return list(layers.values())


def _fake_quant(sites: list[Site]) -> FakeQuant:
    finding = finders(sites)
    first = finding[0]
    if first.kind == "fixed":
        quantizer = Fixed(*first.limits)
    else:
        quantizer = MovingAverage(sites=len(finding), nonnegative=tuple(site.nonnegative for site in finding))
    # Probabilities at the model's output stay exact while training: the loss needs their logarithm.
    in_training = not (first.kind == "fixed" and all(site.is_output for site in sites))
    return FakeQuant(
        quantizer, [site.name for site in finding], first.bits, in_training=in_training, name=f"{first.name}.range"
    )
