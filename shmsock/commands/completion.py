"""`shmsock completion`: print the script by which a shell completes `shmsock`."""

from __future__ import annotations

from importlib import resources

import click

__all__ = ["completion"]

#: Where a shell looks, below /usr/share or any other place for data: wheels install them there.
FILES = {
    "bash": "bash-completion/completions/shmsock",
    "zsh": "zsh/site-functions/_shmsock",
    "fish": "fish/vendor_completions.d/shmsock.fish",
}


@click.command()
@click.argument("shell", type=click.Choice(list(FILES)))
def completion(shell: str) -> None:
    """Print the script of completion for SHELL.

    \b
      source <(shmsock completion bash)   # in ~/.bashrc
      source <(shmsock completion zsh)    # in ~/.zshrc
      shmsock completion fish | source    # in ~/.config/fish/config.fish

    Where a wheel or a distribution's package installed them, shells find them by themselves.
    """
    script = resources.files("shmsock.install") / "share" / FILES[shell]
    click.echo(script.read_text(encoding="utf-8"), nl=False)
