"""The `holdfast` command: names the commands, and turns every error into one line and a code.

Exit codes: 0 done, 1 a bench or a request failed, 2 the operator must change something (an option,
the model, the port, the memory), 130 interrupted. A traceback means a bug of ours.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from holdfast import __version__
from holdfast.cli.bench import bench
from holdfast.cli.chat import chat
from holdfast.cli.drill import drill
from holdfast.cli.faults import faults
from holdfast.cli.generate import generate
from holdfast.cli.plan import plan
from holdfast.cli.ps import ps
from holdfast.cli.replay import replay
from holdfast.cli.serve import serve
from holdfast.cli.simulate import simulate_command
from holdfast.errors import OperatorError, RequestError

EXIT_FAILED = 1
EXIT_OPERATOR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count

# typer's own errors (unknown option, bad value) derive from click's ClickException, which typer
# carries under a private name since 0.24; its public BadParameter leads there in every version.
_UsageError = typer.BadParameter.__mro__[1]
_ClickError = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="holdfast",
    help="An LLM serving engine whose streams survive GPU faults.",
    epilog="Start with: holdfast serve. Then in another terminal: holdfast chat",
    no_args_is_help=True,
    rich_markup_mode="rich",
    # A traceback is for a bug report: plain, and without the values of local variables.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"holdfast {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Say the version."),
    ] = False,
) -> None:
    pass


app.command()(serve)
app.command()(chat)
app.command()(generate)
app.command()(plan)
app.command()(ps)
app.command()(faults)
app.command()(replay)
app.command("simulate")(simulate_command)
app.add_typer(bench, name="bench")
app.add_typer(drill, name="drill")


def main(arguments: list[str] | None = None) -> None:
    """Run a command line and exit; the entry point of `holdfast` and `python -m holdfast`."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code."""
    try:
        code = app(args=arguments, prog_name="holdfast", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except _UsageError as error:
        if not str(error):  # no_args_is_help: the help was the answer
            return EXIT_OPERATOR
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "holdfast"
        return _fail(f"{_one_line(error)} See: {command} --help", EXIT_OPERATOR)
    except _ClickError as error:
        return _fail(_one_line(error), EXIT_OPERATOR)
    except OperatorError as error:
        return _fail(str(error), EXIT_OPERATOR)
    except RequestError as error:
        return _fail(str(error), EXIT_FAILED)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output went away (`holdfast ps | head`): nobody is left to tell.
        sys.stderr.close()
        return EXIT_FAILED


def _one_line(error: Exception) -> str:
    message = error.format_message()  # type: ignore[attr-defined]
    # What a choice raises is told as pydantic would; the option has been named already.
    return " ".join(message.split()).replace("Value error, ", "")


def _fail(message: str, code: int) -> int:
    print(f"holdfast: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
