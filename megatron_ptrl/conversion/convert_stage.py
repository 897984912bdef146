"""`ptrl convert`: checkpoints of Hugging Face and Megatron-LM to ours and back, on a CPU, a tensor at a time.

The output is written under a hidden name beside its own and renamed when it is whole.
"""

import os
import shutil
from pathlib import Path

from megatron_ptrl.config import ConvertConfig
from megatron_ptrl.conversion.hf_input import from_hf_folder
from megatron_ptrl.conversion.hf_output import to_hf_folder
from megatron_ptrl.conversion.megatron_lm import from_megatron_lm, is_megatron_lm, to_megatron_lm
from megatron_ptrl.errors import InputError


def run(config: ConvertConfig) -> None:
    """Convert `config.input`, in the direction that follows from its files, and say what was written."""
    source, final = Path(config.input), Path(config.output)
    if not source.is_dir():
        raise InputError(f"input is {source}, which is no folder")
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise InputError(f"output is {final}, which exists; name a new folder, or an empty one")
    if final.exists() and final.samefile("."):
        raise InputError(f"output is {final}, the current folder, which would be replaced; name a new folder")
    partial = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if (source / "config.json").is_file():
            told = from_hf_folder(config, source, partial, final)
        elif is_megatron_lm(source):
            told = from_megatron_lm(config, source, partial, final)
        elif config.to == "megatron_lm":
            told = to_megatron_lm(config, partial, final)
        else:
            told = to_hf_folder(config, partial, final)
        os.replace(partial, final)
    except OSError as error:
        # Of a copy that failed, the second is what was written.
        where = error.filename2 or error.filename or final
        raise InputError(f"{where}: {error.strerror or error}; {final} was not written") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(told)
