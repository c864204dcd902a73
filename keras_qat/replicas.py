"""What the replicas of a distribution strategy agree on, so that all of them hold the numbers that `freeze` reads.

Keras leaves it at that each one moves its own averages, and saves those of the first.
"""

import tensorflow as tf


def agreed(value):
    """The mean over the replicas of what each of them found in its share of a batch."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return value
    return context.all_reduce(tf.distribute.ReduceOp.MEAN, value)


def agree_on_statistics(batch_norm) -> None:
    """After a call of a batch norm in training."""
    if batch_norm.trainable and tf.distribute.get_strategy().num_replicas_in_sync > 1:
        for average in (batch_norm.moving_mean, batch_norm.moving_variance):
            average.assign(agreed(average.value))
