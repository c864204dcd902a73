"""The peer's process in `pruning_accuracy`: tfmot on tf_keras prunes the float nets that it finds in a folder.

Only `pruning_accuracy` starts this: importing tfmot switches the `tf.keras` of the whole process to legacy Keras.
The request is JSON on stdin, the answer goes into the file that it names.
"""

import json
import pathlib
import sys

import pruning_task as task
import tensorflow_model_optimization as tfmot
import tf_keras

_SPARSITY = tfmot.sparsity.keras


def prune(model, level: str, x, y, seed: int):
    """Prunes a float model while it trains, and takes the wrappers off again."""
    schedule = _SPARSITY.PolynomialDecay(
        0.0, task.LEVELS[level], begin_step=0, end_step=task.PRUNE_UNTIL, frequency=task.PRUNE_EVERY
    )
    more = {"sparsity_m_by_n": (2, 4)} if level == "2:4" else {}

    def wrapped(layer):
        return _SPARSITY.prune_low_magnitude(layer, schedule, **more) if layer.name in task.PRUNED else layer

    pruned = tf_keras.models.clone_model(model, clone_function=wrapped)
    callbacks = [_SPARSITY.UpdatePruningStep()]
    task.fit(tf_keras, pruned, x, y, task.TUNE_STEPS, task.TUNE_RATE, seed, callbacks)
    return _SPARSITY.strip_pruning(pruned)


def main() -> None:
    request = json.load(sys.stdin)
    folder, answers = pathlib.Path(request["folder"]), []
    for name in request["tasks"]:
        x_train, y_train, x_test, y_test = task.load(request["data_dir"], name)
        for seed in range(request["seeds"]):
            weights = folder / f"{name}-{seed}.npz"
            model = task.load_weights(task.build(tf_keras, task.TASKS[name]), weights)
            before = task.accuracy(model, x_test, y_test)
            for level in task.LEVELS:
                tf_keras.utils.set_random_seed(seed)
                pruned = prune(task.load_weights(model, weights), level, x_train, y_train, seed)
                found = task.accuracy(pruned, x_test, y_test)
                answers.append([name, seed, level, before, found, task.sparsity(pruned)])
                print("tfmot", *answers[-1], file=sys.stderr, flush=True)
    pathlib.Path(request["answers"]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
