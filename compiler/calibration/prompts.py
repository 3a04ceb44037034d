"""What calibration denoises when the caller gives no prompts."""

from __future__ import annotations

from sdc.compiler.tiny.captions import BACKGROUNDS, COLOURS, GARMENTS, TEMPLATES, caption

GENERAL = (
    "a photo of an astronaut riding a horse on the moon",
    "a bowl of ramen with a soft-boiled egg, food photography, steam",
    "a watercolour painting of a lighthouse on a rocky coast",
    "portrait of an old fisherman with a grey beard, 85mm, soft light",
    "a red vintage bicycle leaning against a blue door",
    "aerial view of a winding river through an autumn forest",
    "a cyberpunk street at night, neon signs reflected in puddles",
    "a golden retriever puppy asleep on a knitted blanket",
    "a minimalist logo of a fox, flat vector, white background",
    "macro photograph of a dew drop on a leaf",
    "an oil painting of a stormy sea with a small sailing ship",
    "two children building a sandcastle on a beach at sunset",
    "an isometric drawing of a cosy library with tall shelves",
    "a snow-covered mountain village under the northern lights",
    "a black and white photo of a jazz trio on stage",
    "a plate of colourful macarons on a marble table",
    "a medieval castle on a cliff, fantasy concept art, dramatic clouds",
    "close-up of a tabby cat with green eyes",
    "a city skyline in fog, seen from above, early morning",
    "a pencil sketch of a ballet dancer tying her shoes",
    "a steam locomotive crossing a stone viaduct",
    "a glass vase with white tulips by a window, still life",
    "a hot air balloon festival over a desert",
    "a robot watering plants in a greenhouse, illustration",
    "a crowded market in Marrakesh, spices and lanterns",
    "an underwater photo of a coral reef with clownfish",
    "a stained glass window showing a phoenix",
    "a wooden cabin by a frozen lake, smoke from the chimney",
    "a woman in a yellow raincoat walking in the rain, film grain",
    "a chessboard with carved ivory pieces, shallow depth of field",
    "the word OPEN on a bakery sign, brick wall",
    "an abstract composition of circles and triangles, Bauhaus",
)
"""32 prompts of different subjects, materials, light and style, for models of general pictures."""


def prompts_for(model: str) -> tuple[str, ...]:
    """32 prompts in the language of a model: captions for "tiny", ``GENERAL`` for everything else.

    Every garment, colour, background and template of `tiny` occurs.
    """
    if model != "tiny":
        return GENERAL
    return tuple(
        caption(i % len(GARMENTS), i % len(COLOURS), i // 2 % len(BACKGROUNDS), i // 8 % len(TEMPLATES))
        for i in range(len(GENERAL))
    )
