"""`holdfast generate "PROMPT"`: one completion, in this process, streamed to stdout."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.cli.options import EngineOptions, grouped
from holdfast.errors import InvalidField, OptionError

if TYPE_CHECKING:
    from holdfast.api.schema import SamplingParams

SAMPLING_PANEL = "Sampling"


def _option(help: str, default: str | bool = True, **settings: object) -> Any:
    return typer.Option(rich_help_panel=SAMPLING_PANEL, help=help, show_default=default, **settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """Sampling on the command line; ranges are checked where the API's are (api.schema)."""

    max_tokens: Annotated[int, _option("Longest answer in tokens")] = 256
    temperature: Annotated[float, _option("0 is greedy")] = 0.7
    top_p: Annotated[float, _option("Keep the likeliest tokens of this mass")] = 1.0
    top_k: Annotated[int, _option("Keep this many tokens; 0 keeps all")] = 0
    seed: Annotated[int | None, _option("Same seed, same answer", "drawn")] = None
    stop: Annotated[list[str] | None, _option("End at this text; may be repeated")] = None

    def params(self) -> SamplingParams:
        """Raises OptionError naming the option that is out of range."""
        from holdfast.api.schema import SamplingParams

        try:
            return SamplingParams(
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                seed=self.seed,
                stop=list(self.stop or ()),
            )
        except InvalidField as error:
            option = "--" + (error.field or "").replace("_", "-")
            raise OptionError(option, error.message) from error


@grouped
def generate(
    prompt: Annotated[str, typer.Argument(metavar='"PROMPT"', help="Text; - reads stdin.")],
    *,
    model: Annotated[
        str | None,
        typer.Option(help="A folder or hub id.", show_default="the bundled holdfast-tiny"),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")
    ] = False,
    sampling: SamplingOptions,
    engine: EngineOptions,
) -> None:
    """Answer one prompt and exit. No server is needed."""
    from holdfast.cli.engine import open_llm

    text = sys.stdin.read() if prompt == "-" else prompt
    params = sampling.params()
    with open_llm(model, engine) as llm:
        chat = not raw and llm.has_chat_template
        stream = llm.stream_chat([{"role": "user", "content": text}], params) if chat else None
        asyncio.run(_print_stream(stream or llm.stream(text, params)))


async def _print_stream(stream: Any) -> None:
    async for delta in stream:
        sys.stdout.write(delta.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
