"""quamba completion"""

from __future__ import annotations

from pathlib import Path

import click

from quamba.cli.common import report, results_options


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@results_options
@click.pass_context
def completion_command(ctx: click.Context, shell: str, output: Path | None, as_json: bool) -> None:
    """Print the script that makes SHELL complete quamba's commands, options and models.

    \b
    bash: echo 'eval "$(quamba completion bash)"' >> ~/.bashrc
    zsh:  echo 'eval "$(quamba completion zsh)"' >> ~/.zshrc
    fish: quamba completion fish > ~/.config/fish/completions/quamba.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(ctx.find_root().command, {}, "quamba", "_QUAMBA_COMPLETE").source()
    report({"shell": shell, "script": script}, lambda: click.echo(script), output, as_json)
