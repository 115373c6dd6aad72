"""What rivals would do with other settings: less weight on what FT-EWC, MEMIT and MEMIT-MASS are to keep, shorter steps
of UltraEdit, other null spaces of AlphaEdit, other shares of curvature that CrispEdit closes, and more, fewer or other
demonstrations of retrieval.

    python benchmarks/rivals.py --model model --data zsre_mend_edit.json --edits 30 -o rivals/
    python benchmarks/rivals.py --model model --data z500.json --edits 10,100,500 --of ultraedit -o steps/
    python benchmarks/rivals.py --model model --data z500.json --edits 50 --protocol wild --of alphaedit,crispedit
    python benchmarks/rivals.py --model model --data z50.json --train z.json --edits 50 --protocol wild --of rag-shots
    python benchmarks/rivals.py --model model --data z50.json --train z.json --edits 50 --protocol wild --of rag-pairs

Each variant is a method of `wise bench` by another name; rows that are there already are not measured again.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from wisecli.bench.compare import bench as run_bench
from wisecli.bench.methods import load_methods
from wisecli.bench.methods.base import AT_ONCE, METHODS, Bench, Maker
from wisecli.bench.methods.context.rag_shots import RagShots
from wisecli.bench.methods.weights.alphaedit import AlphaEdit, AlphaEditSettings
from wisecli.bench.methods.weights.crispedit import CrispEdit, CrispEditSettings
from wisecli.bench.methods.weights.ft_ewc import FtEwc
from wisecli.bench.methods.weights.memit import Memit, MemitSettings
from wisecli.bench.methods.weights.ultraedit import UltraEdit, UltraEditSettings
from wisecli.bench.reporting.html_tables import markdown
from wisecli.cli.console import Console
from wisecli.config import BenchSettings, LoadOptions

# Of the weight that the methods have by default.
SHARES = (1.0, 0.1, 0.01, 0.001)
# UltraEdit's η.
RATES = (1.0, 0.5, 0.25, 0.1)
# AlphaEdit's threshold and λ, both in parts of the mean second moment.
THRESHOLDS, WEIGHTS = (0.02, 0.2, 2.0), (10.0, 1000.0)
# The share of curvature that CrispEdit closes: their script's default, their commands', their llama3-8b.yaml.
ENERGIES = (0.9, 0.8, 0.99)
# Demonstrations.
SHOTS = (1, 2, 4)
# Where pairs of them begin among the records that may be learnt from.
PAIRS = range(0, 16, 2)


def lighter_ewc(bench: Bench, share: float) -> FtEwc:
    """FT-EWC with a share of its penalty."""
    made = FtEwc(bench)
    made.weight *= share
    return made


def variants() -> dict[str, Maker]:
    """The methods at every weight or step, by a name that says it."""
    ranges = {share: MemitSettings(weight=MemitSettings.weight * share) for share in SHARES}
    return {
        **{f"ft-ewc λ×{share:g}": partial(lighter_ewc, share=share) for share in SHARES},
        **{f"memit λ×{share:g}": partial(Memit, settings=own, batch=1) for share, own in ranges.items()},
        **{f"memit-mass λ×{share:g}": partial(Memit, settings=own) for share, own in ranges.items()},
        **{f"ultraedit η={rate:g}": partial(UltraEdit, settings=UltraEditSettings(rate=rate)) for rate in RATES},
        **{
            f"alphaedit θ={threshold:g} λ={weight:g}": partial(
                AlphaEdit, space=AlphaEditSettings(threshold=threshold, weight=weight), batch=100
            )
            for threshold in THRESHOLDS
            for weight in WEIGHTS
        },
        **{
            f"crispedit γ={energy:g}": partial(CrispEdit, settings=CrispEditSettings(energy=energy))
            for energy in ENERGIES
        },
        **{f"rag-shots ×{count}": partial(RagShots, count=count) for count in SHOTS},
        **{f"rag-pairs {first}": partial(RagShots, first=first) for first in PAIRS},
    }


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--edits", default="30", help="numbers of edits, with commas between")
    parser.add_argument("--of", default="ft-ewc,memit,memit-mass", help="methods, with commas between")
    parser.add_argument("--train", type=Path, help="records to learn from; without it those that are not edited")
    parser.add_argument("--protocol", default="teacher", choices=("teacher", "wild", "forms", "forms,wild"))
    parser.add_argument("-o", "--output", type=Path, default=Path("rivals"))
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    load_methods()
    wanted = arguments.of.split(",")
    made = {name: maker for name, maker in variants().items() if name.split()[0] in wanted}
    for name, maker in made.items():
        METHODS.add(name, maker)
    AT_ONCE.update(name for name in made if name.split()[0] in AT_ONCE)
    protocol = arguments.protocol
    generate = protocol != "teacher"
    settings = BenchSettings(methods=",".join(made), counts=arguments.edits, protocol=protocol, generate=generate)
    console, load = Console(), LoadOptions(device=arguments.device)
    with console.watching() as watch:
        report = run_bench(
            arguments.model,
            arguments.output,
            settings,
            data=[arguments.data],
            train=arguments.train,
            load=load,
            on_progress=watch,
        )
    console.result(report.as_json(), markdown(report.rows))


if __name__ == "__main__":
    main()
