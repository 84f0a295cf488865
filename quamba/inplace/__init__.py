"""Quantizing the Linears of transformers' own models while `from_pretrained` reads them.

    AutoModelForCausalLM.from_pretrained("state-spaces/mamba-130m-hf", quantization_config=QuambaQuantizationConfig("w8a8"))

Nothing here is calibrated: the model stays transformers' model, with its convolution and its scan, and only its
projections become integer. Imported piece by piece: `quamba.auto` registers it while transformers is half loaded.
"""
