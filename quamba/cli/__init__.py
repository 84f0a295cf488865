"""The command line. One file a command, imported when it is called, so that `--help` and bad paths answer at once."""

from __future__ import annotations

import errno
import importlib
import os
from typing import Any

import click

import quamba
from quamba.errors import QuambaError

# command -> (module, attribute, one line for the overview)
COMMANDS = {
    "quantize": ("quamba.cli.quantize", "quantize_command", "Quantize a model into a new folder."),
    "eval": ("quamba.cli.eval", "eval_command", "Measure perplexity, tasks, and distance to another model."),
    "generate": ("quamba.cli.generate", "generate_command", "Continue a prompt, or chat."),
    "card": ("quamba.cli.card", "card_command", "Show a model's card, and put measurements into it."),
    "convert": ("quamba.cli.convert", "convert_command", "Write a checkpoint of any layout as one of quamba's own."),
    "doctor": ("quamba.cli.doctor", "doctor_command", "Say what is wrong with a model, and what was repaired."),
    "inspect": ("quamba.cli.inspect", "inspect_command", "Show a model's plan, component by component."),
    "lm-eval": ("quamba.cli.lm_eval", "lm_eval_command", "lm-eval's own command line, with quamba's models."),
    "completion": ("quamba.cli.completion", "completion_command", "Print what makes a shell complete commands."),
}
RESUMABLE = ("quantize", "eval")


class Commands(click.Group):
    """Loads a command's module when it is used; turns the library's errors into one line and exit code 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[name]
        return getattr(importlib.import_module(module), attribute)

    def resolve_command(self, ctx: click.Context, args: list[str]):
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from quamba.schema import nearest

            raise click.UsageError(f"there is no command {args[0]!r}{nearest(args[0], COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except QuambaError as error:
            if (ctx.obj or 0) >= 2:
                import traceback

                traceback.print_exc()
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.ENAMETOOLONG):
                raise click.ClickException(f"{error.strerror}: {error.filename or 'writing the output'}") from error
            raise
        except KeyboardInterrupt:
            again = "; type the same command again to resume" if ctx.invoked_subcommand in RESUMABLE else ""
            click.echo(f"Interrupted{again}", err=True)
            ctx.exit(130)


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-q", "--quiet", is_flag=True, help="Only results and errors.")
@click.option("-v", "--verbose", count=True, help="Say more; -vv everything, and where an error comes from.")
@click.version_option(quamba.__version__, prog_name="quamba")
@click.pass_context
def main(ctx: click.Context, quiet: bool, verbose: int) -> None:
    """Post-training quantization for state space language models.

    \b
    MODEL, wherever it stands, is one of
      mamba1-nano            a bundled model
      path/to/folder         mamba-ssm's or transformers' layout, or a quantized model
      mamba-130m             short for state-spaces/mamba-130m on the Hugging Face hub
      owner/name             any hub id

    \b
    Start with
      quamba quantize mamba1-nano --w8a8
      quamba eval --task lambada_openai --data bundled
      quamba generate mamba1-nano-w8a8 --prompt "The old man"

    Exit codes: 0 done, 1 something given can't be used, 2 mistyped, 130 interrupted; doctor has its own.
    """
    from quamba.cli.common import QUIET, libraries_at, logging_at

    if quiet and verbose:
        raise click.UsageError("-q and -v contradict each other")
    ctx.obj = QUIET if quiet else min(verbose, 2)
    if os.environ.get("NO_COLOR"):
        ctx.color = False
    ctx.with_resource(logging_at(ctx.obj))
    ctx.with_resource(libraries_at(ctx.obj))


if __name__ == "__main__":
    main()
