"""Options that several commands have, said once."""

from typing import Annotated

import typer

AllFast = Annotated[
    bool, typer.Option("--fast", help="Approximate what can be, for speed: --fp8 and --tiny-decoder together.")
]
Fp8 = Annotated[bool, typer.Option("--fp8", help="Approximate: linears in 8-bit floats; faster on recent GPUs only.")]
TinyDecoder = Annotated[bool, typer.Option("--tiny-decoder", help="Approximate: a small network draws the pictures.")]
