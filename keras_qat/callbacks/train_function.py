"""How callbacks get inside of a training step: around the optimizer, and only while a step is traced or run.

Callbacks never see gradients in `fit`. So what `fit` calls, `model.train_function`, is stood in for by a
`TrainFunction`, which builds Keras's own function anew and, for the length of each call, puts two things around methods of
the optimizer: around `apply` (is the step to be taken at all, and what comes after it), and around the place where the
gradients are unscaled, accumulated and summed over the replicas, just before the update. Between two calls the optimizer
is the user's own, so checkpoints hold nothing of ours, and an interrupted `fit` leaves nothing behind.
"""

import contextlib

import keras
import tensorflow as tf
from keras import ops, tree


class StepCallback(keras.callbacks.Callback):
    """A callback with a say in every training step; what it leaves as it is here does nothing.

    `admits`, `changed` and `after_step` run inside of the graph.
    """

    def prepare(self) -> None:
        """Before the first step of a `fit`, eagerly: everything is built and restored. Checks, and makes variables."""

    def begin(self) -> None:
        """Then, when all callbacks are prepared and none has complained: what is to change before the first step."""

    def next_stage(self) -> bool:
        """Before each run of the train function, which is `steps_per_execution` steps: whether it is to be traced anew."""
        return False

    def around_step(self):
        """A context that holds while a step is traced or run, and only then."""
        return contextlib.nullcontext()

    def admits(self, gradients):
        """Whether the optimizer may take a step on these gradients: a tensor, or None if it may anyway."""

    def changed(self, gradients_and_variables: list) -> list:
        """The pairs that the optimizer is to see: global gradients of the whole batch, and `tf.Variable`s."""
        return gradients_and_variables

    def after_step(self) -> None:
        """Behind the optimizer's step, also where it was not taken."""

    def epoch_logs(self) -> dict[str, float]:
        """What the epoch so far adds to its logs."""
        return {}

    def clock(self) -> int:
        """How many steps the optimizer has done."""
        return int(ops.convert_to_numpy(self.model.optimizer.iterations))

    def steps_per_epoch(self) -> float:
        """How many steps the optimizer does in an epoch, for schedules in epochs."""
        batches = (self.params or {}).get("steps")
        if batches is None:
            raise ValueError(
                "With unit='epochs' the length of an epoch has to be known, and this dataset does not tell it. Give fit "
                "steps_per_epoch, or a schedule in steps."
            )
        return batches / self._batches_per_step()

    def last_step(self, now: int) -> int | None:
        """The step at which this `fit` ends, if it begins with step `now`; None if nobody knows."""
        epochs, batches = (self.params or {}).get("epochs"), (self.params or {}).get("steps")
        return now + epochs * batches // self._batches_per_step() if epochs and batches else None

    def _batches_per_step(self) -> int:
        return core_of(self.model.optimizer).gradient_accumulation_steps or 1

    def on_train_begin(self, logs=None):
        if getattr(self.model, "optimizer", None) is None:
            raise ValueError(
                f"{type(self).__name__} works in the optimizer's step, and model {self.model.name!r} has no optimizer. "
                "Call model.compile(optimizer, loss) first."
            )
        TrainFunction.of(self.model).join(self)

    def on_epoch_begin(self, epoch, logs=None):
        function = TrainFunction.of(self.model)
        function.join(self)  # again, if something in between made the train function anew
        function.calls = 0

    def on_epoch_end(self, epoch, logs=None):
        # Callbacks earlier in the list have seen these already if the length of the epoch was known.
        if logs is not None:
            logs.update(self.epoch_logs())

    def on_train_end(self, logs=None):
        TrainFunction.remove(self.model)


class TrainFunction:
    """Stands in for `model.train_function` during one `fit`. The callbacks in it share one set of hooks."""

    def __init__(self, model: keras.Model):
        self.model, self.callbacks, self.calls = model, [], 0
        self._prepared = False
        self._rebuild()

    @classmethod
    def of(cls, model) -> "TrainFunction":
        """The one of a model; a new one if it has none."""
        if not isinstance(model.train_function, cls):
            function = cls(model)
            model.train_function = function
            vars(model)["make_train_function"] = function._made_again
        return model.train_function

    @staticmethod
    def remove(model) -> None:
        """Gives the model its own train function back."""
        if vars(model).pop("make_train_function", None) is not None:
            model.make_train_function(force=True)

    def join(self, callback: StepCallback) -> None:
        if callback not in self.callbacks:
            self.callbacks.append(callback)

    def _made_again(self, force=False):
        # `fit` begins by asking for its train function: after an interrupted `fit` that is the time to step aside.
        if force:
            self._rebuild()
        else:
            self.remove(self.model)

    def _rebuild(self) -> None:
        type(self.model).make_train_function(self.model, force=True)
        self._function, self.model.train_function = self.model.train_function, self

    def __call__(self, iterator):
        if not self._prepared:
            self._prepare(iterator)
        news = [callback.next_stage() for callback in self.callbacks]
        if any(news):
            self._rebuild()
        with self._hooks():
            logs = self._function(iterator)
        self.calls += 1
        return self._with_ours(logs) if self._ends_epoch() else logs

    def _prepare(self, iterator) -> None:
        model = self.model
        with model.distribute_strategy.scope():
            if not model.built:
                _build(model, iterator)
            if not model.optimizer.built:
                # Left to the first step, its variables would be made inside of a conditional, which cannot be.
                model.optimizer.build(model.trainable_variables)
            for callback in self.callbacks:
                callback.prepare()
            for callback in self.callbacks:
                callback.begin()
        self._prepared = True

    @contextlib.contextmanager
    def _hooks(self):
        outer = self.model.optimizer
        core = core_of(outer)
        with contextlib.ExitStack() as stack:
            for callback in self.callbacks:
                stack.enter_context(callback.around_step())
            if isinstance(core, keras.optimizers.MultiOptimizer):
                stack.enter_context(replaced(core, "apply", self._changing_all(core)))
            else:
                stack.enter_context(replaced(core, "_all_reduce_sum_gradients", self._changing(core)))
            stack.enter_context(replaced(outer, "apply", self._guarding(outer)))
            yield

    def _changing(self, optimizer):
        reduce = optimizer._all_reduce_sum_gradients

        def changed(gradients_and_variables):
            pairs = reduce(gradients_and_variables)
            for callback in self.callbacks:
                pairs = callback.changed(pairs)
            return pairs

        return changed

    def _changing_all(self, optimizer):
        """The same for a MultiOptimizer, before it deals the gradients out: a global norm needs them all."""
        apply = optimizer.apply

        def changed(gradients, trainable_variables=None):
            variables = optimizer._trainable_variables if trainable_variables is None else list(trainable_variables)
            scale = optimizer.loss_scale_factor or 1.0
            given = [(g, v) for g, v in zip(gradients, variables, strict=True) if g is not None]
            pairs = optimizer._all_reduce_sum_gradients([(_times(g, 1.0 / scale), v.value) for g, v in given])
            for callback in self.callbacks:
                pairs = callback.changed(pairs)
            # Every replica hands in its share of what is summed up again later.
            share = scale / self.model.distribute_strategy.num_replicas_in_sync
            news = {id(v): _times(new, share) for (_, v), (new, _) in zip(given, pairs, strict=True)}
            apply([news.get(id(variable)) for variable in variables], variables)

        return changed

    def _guarding(self, optimizer):
        apply = optimizer.apply

        def guarded(gradients, trainable_variables=None):
            gradients = list(gradients)
            present = [gradient for gradient in gradients if gradient is not None]
            answers = [callback.admits(present) for callback in self.callbacks] if present else []
            answers = [answer for answer in answers if answer is not None]
            if answers and isinstance(optimizer, keras.mixed_precision.LossScaleOptimizer):
                # It has to see for itself that the step is none, so that it lowers its scale.
                fate = ops.where(ops.all(ops.stack(answers)), 1.0, float("nan"))
                apply([g if g is None else _scaled(g, fate) for g in gradients], trainable_variables)
            elif answers:
                _apply_if(ops.all(ops.stack(answers)), apply, gradients, trainable_variables)
            else:
                apply(gradients, trainable_variables)
            for callback in self.callbacks:
                callback.after_step()

        return guarded

    def _ends_epoch(self) -> bool:
        steps = (self.callbacks[0].params or {}).get("steps")
        return steps is not None and self.calls >= -(-steps // self.model.steps_per_execution)

    def _with_ours(self, logs):
        """The logs of an epoch's last step: there every callback sees what ours add, wherever in the list it stands."""
        own = self.model.get_metrics_result()
        if isinstance(logs, dict) and logs.keys() == own.keys():
            logs = own
        for callback in self.callbacks:
            logs = {**logs, **callback.epoch_logs()}
        return logs


def core_of(optimizer):
    """The optimizer that updates weights, inside of a LossScaleOptimizer if there is one."""
    return getattr(optimizer, "inner_optimizer", optimizer)


@contextlib.contextmanager
def replaced(owner, name, value):
    """Gives an object an attribute of its own for a while. Past `__setattr__`, where Keras would track it."""
    own, before = vars(owner), vars(owner).get(name)
    own[name] = value
    try:
        yield
    finally:
        if before is None:
            del own[name]
        else:
            own[name] = before


def _times(gradient, factor):
    return gradient if factor == 1.0 else ops.multiply(gradient, factor)


def _scaled(gradient, factor):
    if isinstance(gradient, tf.IndexedSlices):
        values = _scaled(gradient.values, factor)
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    return gradient * ops.cast(factor, gradient.dtype)


def _apply_if(admitted, apply, gradients, variables) -> None:
    if not tf.distribute.has_strategy():
        ops.cond(admitted, lambda: apply(gradients, variables), lambda: None)
        return

    def in_cross_replica(strategy, admitted, gradients, variables):
        # A conditional around an update has to stand outside of the replicas, whose updates wait for one another.
        def apply_everywhere():
            strategy.extended.call_for_each_replica(apply, args=(gradients, variables))

        ops.cond(strategy.experimental_local_results(admitted)[0], apply_everywhere, lambda: None)

    tf.distribute.get_replica_context().merge_call(in_cross_replica, args=(admitted, gradients, variables))


def _build(model, iterator) -> None:
    """Builds a model as its first batch would, from the shapes of the data."""
    try:
        inputs = keras.utils.unpack_x_y_sample_weight(iterator.element_spec)[0]
        model(tree.map_structure(lambda spec: keras.KerasTensor((None, *spec.shape[1:]), spec.dtype.name), inputs))
    except Exception as error:
        raise ValueError(
            f"Model {model.name!r} has no weights yet, and could not be built from the shapes of its training data. "
            "Call it once on a batch before fit."
        ) from error
