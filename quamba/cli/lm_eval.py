"""quamba lm-eval"""

from __future__ import annotations

import sys

import click


@click.command(
    "lm-eval",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval_command(arguments: tuple[str, ...]) -> None:
    """lm-eval's own command line: everything after `quamba lm-eval` goes to it, --help included.

    \b
    quamba lm-eval run --model hf --model_args pretrained=mamba1-nano-w8a8 --tasks lambada_openai
    """
    # transformers' Auto classes know quamba's models because the package is imported.
    from lm_eval.__main__ import cli_evaluate

    before, sys.argv = sys.argv, ["lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
