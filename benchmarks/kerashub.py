"""Other people's models: the backbones of KerasHub, small and with random weights, all the way to the runtimes.

    pip install keras-hub
    python benchmarks/kerashub.py [--models=bert]

Each in a process of its own: quantized, calibrated, compared with the float model, frozen, and run.
"""

import functools
import time

import keras
import numpy as np
from absl import app, flags
from isolated import in_own_process
from printout import default_out, heading, publish, write

import keras_qat as kq
import tflite_export
from tflite_export.table import table

_LENGTH, _WORDS, _SAMPLES = 16, 50, 24
_IMAGE = (64, 64, 3)
_TEXT = {"vocabulary_size": _WORDS, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "intermediate_dim": 64}
_IDS, _MASK, _SEGMENTS = "token_ids", "padding_mask", "segment_ids"
_BOTH_WAYS = tuple(f"{side}_{name}" for side in ("encoder", "decoder") for name in (_IDS, _MASK))
_VIT = {"patch_size": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 32}
_DINO = {**_VIT, "intermediate_dim": 64, "image_shape": _IMAGE}
_RUNTIMES = ("litert", "xnnpack", "tflm")


def _of_text(name, inputs=(_IDS, _MASK), sizes=_TEXT, **options):
    """A backbone that takes sequences of any length, for one length."""
    ids = {key: keras.Input((_LENGTH,), dtype="int32", name=key) for key in inputs}
    return keras.Model(ids, _of_images(name, **sizes, **options)(ids))


def _of_images(name, **options):
    import keras_hub

    return getattr(keras_hub.models, f"{name}Backbone")(**options)


def _llama(name, **options):
    sizes = {key: value for key, value in _TEXT.items() if key != "num_heads"}
    return _of_text(name, sizes=sizes, num_query_heads=4, num_key_value_heads=2, **options)


def _resnet(block="basic_block", stem=(64,), widths=(64, 64), **options):
    return _of_images(
        "ResNet",
        input_conv_filters=list(stem),
        input_conv_kernel_sizes=[3] * len(stem),
        stackwise_num_filters=list(widths),
        stackwise_num_blocks=[2] * len(widths),
        stackwise_num_strides=[1] + [2] * (len(widths) - 1),
        block_type=block,
        **{"image_shape": _IMAGE, **options},
    )


def _features(**options):
    return _resnet("bottleneck_block", widths=(64,) * 4, **options)


def _mit():
    return _of_images(
        "MiT",
        layerwise_depths=[2, 2],
        num_layers=2,
        layerwise_num_heads=[1, 2],
        layerwise_sr_ratios=[2, 1],
        max_drop_path_rate=0.1,
        layerwise_patch_sizes=[7, 3],
        layerwise_strides=[4, 2],
        image_shape=_IMAGE,
        hidden_dims=[16, 32],
    )


def _csp():
    return _of_images(
        "CSPNet",
        stem_filters=16,
        stem_kernel_size=3,
        stem_strides=2,
        stackwise_depth=[1, 2],
        stackwise_strides=[2, 2],
        stackwise_num_filters=[32, 64],
        block_type="dark_block",
        stage_type="dark",
        image_shape=_IMAGE,
    )


def _efficientnet(kinds):
    return _of_images(
        "EfficientNet",
        stackwise_width_coefficients=[1.0] * 3,
        stackwise_depth_coefficients=[1.0] * 3,
        stackwise_kernel_sizes=[3, 3, 5],
        stackwise_num_repeats=[1, 2, 2],
        stackwise_input_filters=[16, 16, 24],
        stackwise_output_filters=[16, 24, 40],
        stackwise_expansion_ratios=[1, 4, 4],
        stackwise_squeeze_and_excite_ratios=[0.25] * 3,
        stackwise_strides=[1, 2, 2],
        stackwise_block_types=kinds,
        stackwise_force_input_filters=[0] * 3,
        stackwise_nores_option=[False] * 3,
        input_shape=_IMAGE,
        num_features=64,
    )


def _hgnet():
    return _of_images(
        "HGNetV2",
        depths=[1] * 4,
        embedding_size=8,
        hidden_sizes=[16, 24, 32, 40],
        stem_channels=[3, 8, 8],
        hidden_act="relu",
        use_learnable_affine_block=True,
        stackwise_stage_filters=[
            [8, 8, 16, 1, 2, 3],
            [16, 8, 24, 1, 2, 3],
            [24, 16, 32, 1, 2, 5],
            [32, 16, 40, 1, 2, 5],
        ],
        apply_downsample=[False, True, True, True],
        use_lightweight_conv_block=[False, False, True, True],
        image_shape=_IMAGE,
    )


def _deeplab():
    return _of_images(
        "DeepLabV3",
        image_encoder=_features(),
        spatial_pyramid_pooling_key="P4",
        upsampling_size=4,
        dilation_rates=[2, 4],
        low_level_feature_key="P2",
        projection_filters=16,
        image_shape=_IMAGE,
    )


def _whisper():
    places = {"max_encoder_sequence_length": 32, "max_decoder_sequence_length": _LENGTH}
    inputs = {"encoder_features": keras.Input((32, 80), name="encoder_features")}
    inputs |= {key: keras.Input((_LENGTH,), dtype="int32", name=key) for key in _BOTH_WAYS[2:]}
    return keras.Model(inputs, _of_images("Whisper", **_TEXT, **places)(inputs))


_part = functools.partial
MODELS = {
    "resnet": _resnet,
    "resnet v2": _part(_resnet, "bottleneck_block", use_pre_activation=True),
    "resnet vd": _part(_resnet, "bottleneck_block_vd", stem=(16, 16, 16)),
    "cspnet": _csp,
    "densenet": _part(_of_images, "DenseNet", stackwise_num_repeats=[2, 2], image_shape=_IMAGE, growth_rate=8),
    "efficientnet": _part(_efficientnet, ["v1"] * 3),
    "efficientnet, fused": _part(_efficientnet, ["fused", "unfused", "cba"]),
    "hgnet": _hgnet,
    "vgg": _part(_of_images, "VGG", stackwise_num_repeats=[1, 1], stackwise_num_filters=[8, 16], image_shape=_IMAGE),
    "xception": _part(
        _of_images,
        "Xception",
        stackwise_conv_filters=[[8, 8], [16, 16], [16, 16]],
        stackwise_pooling=[True, True, False],
        image_shape=_IMAGE,
    ),
    "deeplab v3": _deeplab,
    "retinanet": lambda: _of_images(
        "RetinaNet", image_encoder=_features(), min_level=3, max_level=5, use_p5=False, image_shape=_IMAGE
    ),
    "vit": _part(_of_images, "ViT", **_VIT, mlp_dim=64, image_shape=_IMAGE),
    "deit": _part(_of_images, "DeiT", **_VIT, intermediate_dim=64, image_shape=_IMAGE),
    "dino v2": _part(_of_images, "DINOV2", **_DINO, position_embedding_shape=_IMAGE, num_register_tokens=2),
    "dino v3": _part(_of_images, "DINOV3", **_DINO),
    "mit": _mit,
    "swin": _part(
        _of_images, "SwinTransformer", image_shape=_IMAGE, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4
    ),
    "vit det": _part(
        _of_images,
        "ViTDet",
        hidden_size=32,
        num_layers=2,
        intermediate_dim=64,
        num_heads=2,
        global_attention_layer_indices=[1],
        image_shape=_IMAGE,
        num_output_channels=16,
        window_size=2,
    ),
    "bert": _part(_of_text, "Bert", (_IDS, _MASK, _SEGMENTS)),
    "distilbert": _part(_of_text, "DistilBert"),
    "roberta": _part(_of_text, "Roberta"),
    "albert": _part(_of_text, "Albert", (_IDS, _MASK, _SEGMENTS), embedding_dim=16),
    "electra": _part(
        _of_text,
        "Electra",
        (_IDS, _MASK, _SEGMENTS),
        {**{key: value for key, value in _TEXT.items() if key != "vocabulary_size"}, "vocab_size": _WORDS},
        embedding_dim=16,
    ),
    "deberta v3": _part(_of_text, "DebertaV3"),
    "roformer v2": _part(_of_text, "RoformerV2", (_IDS, _SEGMENTS), head_size=16),
    "esm": _part(_of_text, "ESM", (_IDS,)),
    "xlnet": _part(_of_text, "XLNet", (_IDS, _MASK, _SEGMENTS)),
    "f-net": _part(
        _of_text, "FNet", (_IDS, _SEGMENTS), {key: value for key, value in _TEXT.items() if key != "num_heads"}
    ),
    "gpt2": _part(_of_text, "GPT2"),
    "opt": _part(_of_text, "OPT"),
    "bloom": _part(_of_text, "Bloom"),
    "gpt-neox": _part(_of_text, "GPTNeoX"),
    "llama": _part(_llama, "Llama"),
    "mistral": _part(_llama, "Mistral"),
    "qwen": _part(_llama, "Qwen"),
    "phi 3": _part(_llama, "Phi3"),
    "gemma": _part(_llama, "Gemma", head_dim=8),
    "bart": _part(_of_text, "Bart", _BOTH_WAYS),
    "t5": _part(_of_text, "T5", _BOTH_WAYS),
    "whisper": _whisper,
}

_ONLY = flags.DEFINE_multi_enum("models", list(MODELS), list(MODELS), "Which; give it once for each.")
_OUT = flags.DEFINE_string("out", default_out(__file__), "Where the text goes.")
_COLUMNS = ("model", "ops", "int8", "SQNR, dB", *_RUNTIMES, "verified", "s")


def _samples(model):
    """Noise, and sentences of all lengths."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(_LENGTH // 2, _LENGTH + 1, (_SAMPLES, 1))

    def one(tensor):
        shape = (_SAMPLES, *tensor.shape[1:])
        if _MASK in tensor.name:
            return (np.arange(_LENGTH) < lengths).astype("int32")
        if "int" in tensor.dtype:
            return generator.integers(0, 2 if tensor.name == _SEGMENTS else _WORDS, shape).astype("int32")
        return generator.normal(size=shape).astype("float32")

    return keras.tree.map_structure(one, model.input)


def measure(name: str) -> tuple:
    """The cells of a row."""
    keras.utils.set_random_seed(0)
    model = MODELS[name]()
    samples = _samples(model)
    start = time.perf_counter()
    qat = kq.quantize(model)
    seconds = time.perf_counter() - start
    kq.calibrate(qat, samples)
    expected, given = (np.concatenate([np.ravel(y) for y in _outputs(one, samples)]) for one in (model, qat))
    ratio = 10 * np.log10(np.mean(expected**2) / np.mean((expected - given) ** 2))
    start = time.perf_counter()
    content = tflite_export.write(kq.freeze(qat, portable=True))
    seconds += time.perf_counter() - start
    summary = tflite_export.inspect(content)
    few = keras.tree.map_structure(lambda x: x[:8], samples)
    parity = tflite_export.verify(content, qat, few, runtimes=_RUNTIMES)
    verdict = "passed" if parity.passed else "FAILED"
    cells = [_worst([r for r in parity.results if r.runtime == runtime]) for runtime in _RUNTIMES]
    return (
        len(summary.ops),
        "full" if summary.is_full_int8 else "no",
        f"{ratio:.1f}",
        *cells,
        verdict,
        f"{seconds:.1f}",
    )


def _outputs(model, samples) -> list:
    return keras.tree.flatten(model.predict(samples, verbose=0))


def _worst(results) -> str:
    if not results:
        return "-"
    worst = max(results, key=lambda result: result.max_lsb)
    return "exact" if worst.max_lsb == 0 else f"{100 * worst.mismatch:.2f} % {worst.max_lsb}"


def main(_) -> None:
    rows, reasons = [], []
    title = heading(
        "Backbones of KerasHub, small, with random weights",
        f"calibrated with {_SAMPLES} samples; SQNR of all outputs against the float model; cells: share of outputs that "
        "differ from the QAT model, largest difference in LSB; s: quantize, freeze and write",
        with_peer=False,
    )
    for name in _ONLY.value:
        try:
            rows.append((name, *in_own_process(measure, name)))
        except Exception as error:  # whatever it is, the table says it, and the next one has its turn
            rows.append((name, *["-"] * (len(_COLUMNS) - 3), "refused", "-"))
            lines = [line.strip(" -") for line in str(error).strip().splitlines()]
            reasons.append(f"{name}: {lines[min(1, len(lines) - 1)][:300]}")
        write("\n".join([title, "", table(_COLUMNS, rows), "", *reasons]), _OUT.value)
        print(*rows[-1], flush=True)
    publish("\n".join([title, "", table(_COLUMNS, rows), "", *reasons]), _OUT.value)


if __name__ == "__main__":
    app.run(main)
