"""Pixels of an export's image processors where torchvision can be imported; run by tests in a process of its own.

    python make_pixels.py FOLDER OUTPUT PICTURE...

Writes `stock.N`, `named.N` (the class that the folder brings) and `ours.N` of every picture; prints the classes.
"""

from __future__ import annotations

import sys

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoProcessor
from transformers.utils import is_torchvision_available

from megatron_ross.evaluation.generate import load_for_inference

if __name__ == "__main__":
    folder, output, *pictures = sys.argv[1:]
    assert is_torchvision_available()
    processors = {
        "stock": AutoProcessor.from_pretrained(folder).image_processor,
        "named": AutoProcessor.from_pretrained(folder, trust_remote_code=True).image_processor,
        "ours": load_for_inference(folder, device="cpu")[1].image_processor,
    }
    pixels = {}
    for kind, processor in processors.items():
        for number, picture in enumerate(pictures):
            image = Image.open(picture).convert("RGB")
            values = processor(image, return_tensors="pt")["pixel_values"][0]
            pixels[f"{kind}.{number}"] = torch.as_tensor(values).contiguous()
    save_file(pixels, output)
    print(*(type(processor).__name__ for processor in processors.values()))
