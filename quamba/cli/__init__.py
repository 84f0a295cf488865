"""The command line. One file a command, imported when it is called, so that `--help` and bad paths answer at once."""

from __future__ import annotations

import errno
import importlib
from typing import Any

import click

import quamba
from quamba.errors import QuambaError

# command -> (module, attribute, one line for the overview)
COMMANDS = {
    "quantize": ("quamba.cli.quantize", "quantize_command", "Quantize a model into a new folder."),
    "eval": ("quamba.cli.eval", "eval_command", "Measure perplexity, tasks, and distance to another model."),
    "generate": ("quamba.cli.generate", "generate_command", "Continue a prompt."),
    "card": ("quamba.cli.card", "card_command", "Show a model's card, and put measurements into it."),
    "convert": ("quamba.cli.convert", "convert_command", "Write a checkpoint of any layout as one of quamba's own."),
    "doctor": ("quamba.cli.doctor", "doctor_command", "Say what is wrong with a model, and what was repaired."),
    "inspect": ("quamba.cli.inspect", "inspect_command", "Show a model's plan, component by component."),
}


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
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.ENAMETOOLONG):
                raise click.ClickException(f"{error.strerror}: {error.filename or 'writing the output'}") from error
            raise
        except KeyboardInterrupt:
            again = "; type the same command again to resume" if ctx.invoked_subcommand == "quantize" else ""
            click.echo(f"Interrupted{again}", err=True)
            ctx.exit(130)


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(quamba.__version__, prog_name="quamba")
def main() -> None:
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
    """


if __name__ == "__main__":
    main()
