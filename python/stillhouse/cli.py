"""The `stillhouse` command: thin, each subcommand loads what it needs when it is called."""

from __future__ import annotations

import sys

from stillhouse.errors import UsageError, exit_code

try:
    import typer
except ModuleNotFoundError:
    sys.exit("stillhouse: error: the command line needs typer: pip install 'stillhouse[cli]'")

app = typer.Typer(
    name="stillhouse",
    help="Distillation for PyTorch, from the kernel up.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


# For subcommands with a parser of their own: everything is handed on, --help included.
HANDED_ON = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}


@app.command(
    context_settings=HANDED_ON,
    help="Distil a language model: --teacher, --student, --data, --method, all training arguments.",
)
def distill(context: typer.Context) -> None:
    from stillhouse.recipes import distill as job

    raise typer.Exit(job.main(context.args))


@app.command(
    help="Store the top of a teacher's distribution: distill --teacher-shards reads it.",
    # --top_k as well, as distill takes both.
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
)
def capture(
    teacher: str = typer.Option(..., help="hub id, folder, .gguf file, or smollm2"),
    data: str = typer.Option(..., help="as for distill"),
    out: str = typer.Option(..., help="folder for the shards and the manifest"),
    top_k: int = typer.Option(64, help="columns that are stored of each row"),
    draws: int = typer.Option(0, help="so many of them drawn from all that are not the largest"),
    values: str = typer.Option("fp16", help="log-probabilities as exact, fp16, bf16 or compact"),
    temperature: float = typer.Option(1.0, help="of the softmax that is stored"),
    teacher_dtype: str = typer.Option("auto", help="auto, float32, bfloat16 or float16"),
    max_length: int = typer.Option(512, help="tokens of an example, as for distill"),
    eval_data: str | None = typer.Option(None, help="as for distill, which holds it out"),
    eval_share: float = typer.Option(0.05, help="as for distill, which holds it out"),
    vocab_size: int | None = typer.Option(None, help="columns that count, the others are padding"),
    batch_size: int = typer.Option(8, help="examples of a forward"),
    shard_rows: int = typer.Option(1 << 16, help="rows of a file, about"),
    part: str | None = typer.Option(None, help="2/4: the second of four processes (or torchrun)"),
    overwrite: bool = typer.Option(False, help="replace another capture in the folder"),
    debug: bool = typer.Option(False, help="show the traceback of an error"),
) -> None:
    given = {name: value for name, value in locals().items() if name != "debug"}

    def action() -> None:
        from stillhouse.recipes import capture as job

        job.capture(job.CaptureArguments(**given))

    raise typer.Exit(exit_code(action, traceback_wanted=debug))


@app.command(
    help="Quantize a language model to two bits a weight: least squares, then scales that learn "
    "from the original. Leaves the best model, a report and plots.",
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
)
def quantize(
    model: str = typer.Option(
        "smollm2", help="hub id, folder, .gguf file, smollm2, or layers:0,1,2@MODEL"
    ),
    data: str = typer.Option("stdlib-docs", help="as for distill"),
    out: str = typer.Option("runs/quantize", help="folder for the model, the report and plots"),
    group_size: int = typer.Option(64, help="weights that share two scales"),
    steps: int = typer.Option(
        40,
        help="of each of two distillations, KD and DAD; 0 skips them (40 of smollm2 and all else "
        "take about 8 minutes on two cores)",
    ),
    batch_size: int = typer.Option(8, help="examples of a step"),
    max_length: int = typer.Option(128, help="tokens of an example, as for distill"),
    learning_rate: float = typer.Option(2e-2, help="of the scales, relative; it falls to 0"),
    eval_data: str | None = typer.Option(None, help="as for distill, which holds it out"),
    eval_share: float = typer.Option(0.08, help="as for distill, which holds it out"),
    eval_tokens: int = typer.Option(8192, help="of the held-out text, at most about so many"),
    seed: int = typer.Option(0, help="of the order of the examples"),
    resume: bool = typer.Option(False, help="go on with the run that was stopped in --out"),
    overwrite: bool = typer.Option(False, help="start again in --out, unless --resume is given"),
    debug: bool = typer.Option(False, help="show the traceback of an error"),
) -> None:
    given = {name: value for name, value in locals().items() if name != "debug"}

    def action() -> None:
        from stillhouse.recipes import quantize as job

        job.quantize(job.QuantizeArguments(**given))

    raise typer.Exit(exit_code(action, traceback_wanted=debug))


@app.command(
    help="Speculative decoding: tokens a second with drafts beside plain generate(), on text that "
    "repeats itself, code and prose. Leaves a report and plots.",
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
)
def speculate(
    target: str = typer.Option("smollm2", help="hub id, folder, .gguf file, or smollm2"),
    draft: str | None = typer.Option(
        None,
        help="a smaller model with the target's tokenizer: hub id, folder or .gguf; if neither "
        "this nor --drafter is given, the student of smollm2 that `make distill` left in runs/",
    ),
    drafter: str | None = typer.Option(
        None, help="aded, ngram or fspad (with --head), or several: aded,ngram; else aded"
    ),
    head: str | None = typer.Option(None, help="folder of the draft head of fspad"),
    corpus: str = typer.Option("stdlib-docs", help="what aded counts first, as --data of distill"),
    prompts: str | None = typer.Option(None, help="more texts to continue, as --data of distill"),
    out: str = typer.Option("runs/speculate", help="folder for the report and plots"),
    dtype: str = typer.Option("float32", help="auto, float32, bfloat16 or float16; of all models"),
    max_new_tokens: int = typer.Option(128, help="tokens that are written behind each prompt"),
    prompt_tokens: int = typer.Option(96, help="tokens of a prompt, at most"),
    draft_length: int = typer.Option(5, help="tokens that --draft proposes, at most"),
    max_nodes: int = typer.Option(32, help="nodes of a tree, at most; the clock decides"),
    temperature: float = typer.Option(0.0, help="0 is greedy"),
    top_p: float | None = typer.Option(None, help="as in transformers"),
    mode: str = typer.Option("auto", help="of ops.tree_verify; typical is lossy"),
    repeats: int = typer.Option(5, help="rounds, of which the median counts"),
    seed: int = typer.Option(0, help="of what is drawn"),
    debug: bool = typer.Option(False, help="show the traceback of an error"),
) -> None:
    given = {name: value for name, value in locals().items() if name != "debug"}

    def action() -> None:
        from stillhouse.recipes import speculate as job

        job.speculate(job.SpeculateArguments(**given))

    raise typer.Exit(exit_code(action, traceback_wanted=debug))


@app.command(help="List the methods, or show one: equation, defaults, example.")
def methods(
    id: str | None = typer.Argument(None, help="a method, such as taid"),
    domain: str | None = typer.Option(None, help="list those of one domain, such as language"),
) -> None:
    from stillhouse.recipes import runner

    raise typer.Exit(exit_code(lambda: runner.show(id, domain)))


@app.command(help="Measure what a method claims, on real data; leaves report.json and plots.")
def run(
    id: str | None = typer.Argument(None, help="a method, such as taid"),
    seeds: int | None = typer.Option(
        None, help="seeds 0 to this number minus 1; else up to three, as fit into two minutes"
    ),
    everything: bool = typer.Option(False, "--all", help="every method; rewrites docs/claims.md"),
    start_with: str | None = typer.Option(None, help="with --all: begin at this method"),
    debug: bool = typer.Option(False, help="show the traceback of an error"),
) -> None:
    from stillhouse.recipes import runner

    def action() -> None:
        if everything == (id is not None):
            raise UsageError("name one method, or pass --all: stillhouse methods lists them")
        if start_with is not None and not everything:
            raise UsageError("--start-with is of --all")
        if everything:
            runner.claims(seeds, start_with=start_with)
        else:
            runner.run(id, seeds)

    raise typer.Exit(exit_code(action, traceback_wanted=debug))


@app.command(
    context_settings=HANDED_ON,
    help="Measure our ops beside plain torch, torch.compile and peers, from a source tree.",
)
def bench(context: typer.Context) -> None:
    def action() -> int:
        try:
            # The driver stands beside the package, in the source tree the command is run from.
            sys.path.insert(0, "")
            from bench import driver
        except ModuleNotFoundError as error:
            if error.name != "bench":
                raise
            raise UsageError("no bench folder here: run it in a clone of the repository") from error
        return driver.main(context.args)

    raise typer.Exit(exit_code(action))


def main() -> None:
    """Entry point of the console script."""
    try:
        status = app(standalone_mode=False, args=sys.argv[1:])
    except typer.Exit as error:
        status = error.exit_code
    except Exception as error:
        # The command line's own complaints (an unknown subcommand, a missing argument) come from
        # click or from typer's copy of it: what they share is this method.
        describe = getattr(error, "format_message", None)
        if describe is None:
            raise
        if describe():
            print(f"stillhouse: error: {describe()}", file=sys.stderr)
        status = error.exit_code
    sys.exit(status or 0)
