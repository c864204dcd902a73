"""Normalizations and attention: the tables for the tests of their lowerings and for the whole-path test."""

import numpy as np
from cases import SERIES, VECTOR, Case
from keras import layers, ops
from keras.src.applications.convnext import LayerScale, StochasticDepth

_CAUSAL = np.tri(16, dtype=bool)
_SOME = np.random.default_rng(0).random((1, 8, 8)) > 0.5
_WIDE, _SHORT = (16, 32), (8, 32)


def _self_attention(**options):
    call = {name: options.pop(name) for name in ("use_causal_mask", "attention_mask") if name in options}
    return lambda x: layers.MultiHeadAttention(2, 8, **options)(x, x, **call)


def _handwritten(mask):
    """Attention as custom layers write it in keras.ops, `mask` applied to its scores."""

    def attend(x):
        query, key, value = (ops.reshape(layers.Dense(8)(x), (-1, 16, 2, 4)) for _ in range(3))
        query, key, value = (ops.transpose(y, (0, 2, 1, 3)) for y in (query, key, value))
        scores = mask(ops.matmul(query, ops.swapaxes(key, -1, -2)) / 2.0)
        result = ops.matmul(ops.softmax(scores, axis=-1), value)
        return ops.reshape(ops.transpose(result, (0, 2, 1, 3)), (-1, 16, 8))

    return attend


NORMS = [
    Case("layer_norm", lambda x: layers.LayerNormalization()(x), (_WIDE,)),
    Case("layer_norm_of_vectors", lambda x: layers.LayerNormalization()(x), (VECTOR,)),
    Case("layer_norm_of_images", lambda x: layers.LayerNormalization(epsilon=1e-6)(x)),
    Case("layer_norm_over_two_axes", lambda x: layers.LayerNormalization(axis=(1, 2))(x), (SERIES,)),
    Case("layer_norm_over_axis_1", lambda x: layers.LayerNormalization(axis=1)(x), (SERIES,)),
    Case("layer_norm_without_scale", lambda x: layers.LayerNormalization(scale=False)(x), (_WIDE,)),
    Case("layer_norm_without_center", lambda x: layers.LayerNormalization(center=False)(x), (_WIDE,)),
    Case("layer_norm_plain", lambda x: layers.LayerNormalization(scale=False, center=False)(x), (_WIDE,)),
    Case("layer_norm_ops", lambda x: ops.layer_normalization(x), (_WIDE,)),
    Case("rms_norm", lambda x: layers.RMSNormalization()(x), (_WIDE,)),
    Case("rms_norm_ops", lambda x: ops.rms_normalization(x), (_WIDE,)),
    Case("group_norm", lambda x: layers.GroupNormalization(2)(x)),
    Case("group_norm_of_one_group", lambda x: layers.GroupNormalization(1)(x)),
    Case("group_norm_per_channel", lambda x: layers.GroupNormalization(-1)(x)),
    Case("group_norm_of_series", lambda x: layers.GroupNormalization(4, scale=False)(x), (_WIDE,)),
    Case("group_norm_of_vectors", lambda x: layers.GroupNormalization(2)(x), (VECTOR,)),
    Case("group_norm_of_volumes", lambda x: layers.GroupNormalization(2)(x), ((4, 4, 4, 8),)),
    Case("unit_norm", lambda x: layers.UnitNormalization()(x), (SERIES,)),
    Case("unit_norm_over_axis_1", lambda x: layers.UnitNormalization(axis=1)(x), (SERIES,)),
    Case("normalize_ops", lambda x: ops.normalize(x), (SERIES,)),
    Case("normalize_by_absolute_values", lambda x: ops.normalize(x, order=1), (SERIES,)),
    Case("spectral_norm", lambda x: layers.SpectralNormalization(layers.Conv2D(6, 3))(x), exact=True),
    Case("layer_scale", lambda x: StochasticDepth(0.2)(LayerScale(0.1, 8)(x)), exact=True),
]
ATTENTION = [
    Case("multi_head", _self_attention(), (_SHORT,)),
    Case("multi_head_of_16", lambda x: layers.MultiHeadAttention(4, 16)(x, x), ((16, 64),)),
    Case("multi_head_of_49", lambda x: layers.MultiHeadAttention(2, 16)(x, x), ((49, 32),)),
    Case("multi_head_of_128", lambda x: layers.MultiHeadAttention(4, 16)(x, x), ((128, 64),)),
    Case("multi_head_causal_of_32", _self_attention(use_causal_mask=True), ((32, 32),)),
    Case("multi_head_causal", _self_attention(use_causal_mask=True), (_SHORT,)),
    Case("multi_head_masked", _self_attention(attention_mask=_SOME), (_SHORT,)),
    Case("multi_head_window", _self_attention(sliding_window=3), (_SHORT,)),
    Case("multi_head_gate", _self_attention(use_gate=True), ((4, 32),)),
    Case("multi_head_dropout_causal", _self_attention(dropout=0.1, use_causal_mask=True), (_SHORT,)),
    Case("multi_head_of_one_head", lambda x: layers.MultiHeadAttention(1, 8, use_bias=False)(x, x), (_SHORT,)),
    Case(
        "multi_head_cross",
        lambda x, y: layers.MultiHeadAttention(2, 8, value_dim=5, output_shape=7)(x, y),
        (_SHORT, (6, 20)),
    ),
    Case("multi_head_on_images", _self_attention(attention_axes=(1, 2)), ((2, 4, 16),)),
    Case("multi_head_on_rows", _self_attention(attention_axes=(2,)), ((4, 5, 16),)),
    Case("group_query", lambda x: layers.GroupQueryAttention(8, 4, 2)(x, x, use_causal_mask=True), (_SHORT,)),
    Case("group_query_dropout", lambda x: layers.GroupQueryAttention(8, 4, 2, dropout=0.1)(x, x), (_SHORT,)),
    Case("multi_query", lambda x: layers.GroupQueryAttention(8, 4, 1)(x, x), (_SHORT,)),
    Case("attention", lambda x, y: layers.Attention(use_scale=True)([x, y]), (SERIES, SERIES)),
    Case("attention_causal", lambda x, y: layers.Attention()([x, y], use_causal_mask=True), (SERIES, SERIES)),
    Case("attention_concat", lambda x, y: layers.Attention(score_mode="concat")([x, y]), (SERIES, SERIES)),
    Case("attention_additive", lambda *x: layers.AdditiveAttention()(list(x)), (SERIES, (9, 8), (9, 8))),
    Case("dot_product", ops.dot_product_attention, ((6, 4, 8), (7, 2, 8), (7, 2, 8))),
    Case(
        "dot_product_bias",
        lambda q, k, v: ops.dot_product_attention(q, k, v, bias=np.linspace(0, 1, 7, dtype="float32")),
        ((6, 4, 8), (7, 4, 8), (7, 4, 8)),
    ),
    Case("handwritten", _handwritten(lambda scores: scores), (SERIES,)),
    Case("handwritten_where", _handwritten(lambda scores: ops.where(_CAUSAL, scores, -1e9)), (SERIES,)),
    Case("handwritten_plus", _handwritten(lambda scores: scores + np.where(_CAUSAL, 0.0, -1e9)), (SERIES,)),
]
CONTRACTIONS = [
    *(
        Case(
            equation,
            lambda x, e=equation, s=shape, b=bias: layers.EinsumDense(e, s, b and "relu", b)(x),
            (given,),
            True,
        )
        for equation, given, shape, bias in [
            ("ab,bc->ac", (24,), (5,), "c"),
            ("abc,cd->abd", SERIES, (None, 5), "d"),
            ("abc,cde->abde", SERIES, (None, 3, 5), "de"),
            ("abcd,cde->abe", (4, 6, 3), (None, 5), None),
            ("...x,xy->...y", (4, 3, 6), 5, "y"),
            ("abc,bd->acd", SERIES, (8, 5), "d"),
            ("abc,cde->abed", SERIES, (None, 5, 3), "d"),
        ]
    ),
    Case("abc,bcd->abd", lambda x: layers.EinsumDense("abc,bcd->abd", (16, 5), bias_axes="bd")(x), (SERIES,)),
    Case("dot", lambda x, y: layers.Dot(axes=(2, 2))([x, y]), (SERIES, (5, 8))),
    Case("dot_of_vectors", lambda x, y: layers.Dot(axes=-1, normalize=True)([x, y]), (VECTOR, VECTOR)),
    Case("dot_of_images", lambda x, y: layers.Dot(axes=(2, 3))([x, y]), ((3, 6, 4), (2, 5, 6))),
    Case("tensordot", lambda x: ops.tensordot(x, np.eye(24).reshape(8, 3, 24), axes=1), (SERIES,), True),
    Case("einsum_weights_first", lambda x: ops.einsum("cd,abc->abd", np.eye(8, 5), x), (SERIES,), True),
    Case("einsum_from_the_left", lambda x: ops.einsum("ts,bsc->btc", np.tri(4, 16), x), (SERIES,), True),
    Case("einsum_one_tensor", lambda x: ops.einsum("abcd->adb", x)),
    Case("einsum_heads", lambda x, y: ops.einsum("aecd,abcd->acbe", x, y), ((5, 4, 8), (6, 4, 8))),
    Case("einsum_ellipsis", lambda x, y: ops.einsum("...ij,...jk->...ik", x, y), ((5, 4, 8), (5, 8, 3))),
    Case("einsum_outer", lambda x, y: ops.einsum("ab,ac->abc", x, y), ((5,), (8,))),
    Case("where_constant", lambda x: ops.where(_CAUSAL[:, :8], x, 0.5), (SERIES,)),
    Case("softmax_over_two_axes", lambda x: layers.Softmax(axis=(1, 2))(x), (SERIES,)),
]
