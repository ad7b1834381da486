"""Kill a distillation at random moments, go on with --resume, and compare the students' bytes.

    python benchmarks/kill_resume.py --work runs/kill-resume
    python benchmarks/kill_resume.py --work /tmp/kill --tiny --kills 3

One run is left alone. Then each of the others is killed once with SIGKILL, at a moment drawn from
the steps of student and control and the measuring after them, and resumed. The moment is a step and a
little more, not a time, so that a machine whose speed changes is killed everywhere. Prints one JSON
object; ends with 1 unless every run has the first one's SHA-256 of student and control. The teacher
is minilm-l6 fine-tuned on builtin/verdicts, or with --tiny a toy.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path

from toys import machine

STUDENTS = ("student/model.safetensors", "control/student/model.safetensors")
REAL = ["--dataset", "builtin/verdicts", "--set", "dataset.train_rows=640"]


def stillroom(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "stillroom.cli", *map(str, arguments)]


def distillation(teacher: Path, data: list[str], *more: str) -> list[str]:
    """Return the command of a run of a minute at most, without its output folder."""
    command = stillroom("distill", "--teacher", teacher, *data, "--control", *more)
    settings = ("training.epochs=2", "training.checkpoint_every=7", "training.log_every=1")
    return [*command, *(part for setting in settings for part in ("--set", setting))]


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=stream)


def steps_done(folder: Path) -> int:
    """Return the last step of a log; a line may be half written."""
    log = folder / "log.jsonl"
    lines = log.read_text(encoding="utf-8").split("\n")[:-1] if log.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def leave_alone(command: list[str], folder: Path) -> int:
    """Do a run without a kill and return its steps."""
    log = folder.with_suffix(".log")
    if code := start([*command, "-o", str(folder)], log).wait():
        raise SystemExit(f"The run failed with {code}: see {log}")
    return json.loads((folder / "metrics.json").read_text())["train"]["steps"]


def kill_and_resume(
    command: list[str], folder: Path, moment: float, seconds: float, steps: int
) -> dict[str, object] | None:
    """Kill a run, resume it, and return what was seen.

    Args:
        command: The run's, without its folder.
        folder: The run's folder, new.
        moment: Below 1 the share of the student's steps that are done, below 2 one more than that
            of the control's, from 2 on after both.
        seconds: How long after that moment.
        steps: Steps of the student, and of the control.

    Returns:
        None if the run had ended by then.
    """
    log = folder.with_suffix(".log")
    process = start([*command, "-o", str(folder)], log)
    place, share = (folder, moment) if moment < 1 else (folder / "control", min(1.0, moment - 1))
    # The run can be resumed from the moment it has a recipe, before its first step.
    while not (folder / "recipe.yaml").exists() or steps_done(place) < share * steps:
        if process.poll() is not None:
            raise SystemExit(f"The run ended with {process.returncode} before step {moment}: see {log}")
        time.sleep(0.002)
    time.sleep(seconds)
    process.kill()
    if process.wait() != -9:
        return None
    seen: dict[str, object] = {
        "moment": round(moment, 3),
        "student_step": steps_done(folder),
        "control_step": steps_done(folder / "control"),
        "checkpoints": sorted(str(path.relative_to(folder)) for path in folder.glob("**/step-*")),
    }
    if code := start(stillroom("distill", "--resume", folder), log).wait():
        raise SystemExit(f"The resumed run failed with {code}: see {log}")
    return seen


def hashes(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in STUDENTS}


def compare(command: list[str], work: Path, kills: int, seed: int) -> dict[str, object]:
    """Return the hashes of a run that is left alone and of `kills` that are not."""
    work.mkdir(parents=True, exist_ok=True)
    steps = leave_alone(command, work / "alone")
    expected = hashes(work / "alone")
    chance = random.Random(seed)
    killed: list[dict[str, object]] = []
    attempts = 0
    while len(killed) < kills:
        attempts += 1
        folder = work / f"killed-{attempts}"
        seen = kill_and_resume(command, folder, chance.uniform(0, 2.1), chance.uniform(0, 0.2), steps)
        if seen is not None:
            found = hashes(folder)
            killed.append({**seen, "sha256": found, "identical": found == expected})
    return {
        "identical": all(run["identical"] for run in killed),
        "seed": seed,
        "steps": steps,
        "sha256": expected,
        "killed": killed,
    }


def toy_teacher(work: Path) -> tuple[Path, list[str]]:
    """Fine-tune a tiny random encoder on sentences whose last word is their label."""
    tests = Path(__file__).parents[1] / "tests"
    sys.path[:0] = [str(tests), str(tests / "cli")]
    from workspace import write_data

    from tiny import save_encoder

    data = write_data(work / "data")
    encoder = save_encoder(work / "encoder", layers=4, width=24)
    dataset = ["--dataset", str(data)]
    rate = ["--set", "training.learning_rate=0.005", "--set", "training.epochs=4"]
    command = stillroom("finetune", "--model", encoder, *dataset, *rate, "-o", work / "teacher")
    subprocess.run(command, check=True, stdout=sys.stderr)
    return work / "teacher", dataset


def real_teacher(work: Path) -> tuple[Path, list[str]]:
    teacher = work / "teacher"
    if not (teacher / "metrics.json").exists():
        command = stillroom("finetune", "--model", "minilm-l6", "--dataset", "builtin/verdicts")
        subprocess.run([*command, "-o", str(teacher)], check=True, stdout=sys.stderr)
    return teacher, REAL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/kill-resume"), help="a new folder")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--tiny", action="store_true", help="a toy teacher: a minute instead of many")
    options = parser.parse_args()
    work = options.work.absolute()
    teacher, data = toy_teacher(work) if options.tiny else real_teacher(work)
    layers = "layers:2,4" if options.tiny else "layers:2,4,6"
    command = distillation(teacher, data, "--student", layers)
    found = compare(command, work / "runs", options.kills, options.seed)
    print(json.dumps({"machine": machine(), **found}, indent=2))
    sys.exit(0 if found["identical"] else 1)


if __name__ == "__main__":
    main()
