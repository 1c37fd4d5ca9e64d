"""The same without `await`: a `def` workflow, whose steps are plain functions, two of them side by side."""

from perdure import sync, workflow


def fetch(page: int) -> list[str]:
    return [f"row {page}.{n}" for n in range(3)]


def store(rows: list[str]) -> int:
    return len(rows)


@workflow
def collect(ctx: sync.Context, pages: int) -> int:
    pending = [ctx.step.start(f"fetch-{page}", fetch, page) for page in range(pages)]
    rows = [row for each in pending for row in each.result()]
    ctx.step.sleep("breath", 0.1)
    return ctx.step.run("store", store, rows)


def main() -> None:
    with sync.Engine("sqlite:///collect.db", workflows=[collect]) as engine:
        run = engine.start(collect, 4)
        print(run.result())


if __name__ == "__main__":
    main()
