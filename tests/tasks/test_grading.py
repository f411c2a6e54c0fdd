"""The pool of killable workers: right verdicts, hostile text, death of every process involved."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ogls.records import Problem, Verdict
from ogls.tasks.base import Verifier
from ogls.tasks.by_kind import ByKind
from ogls.tasks.gold import complaint, gold_faults
from ogls.tasks.grading import GradingPool
from ogls.tasks.reasoning_gym import ReasoningGym
from ogls.tasks.tables import JsonlProblems

DATA = Path(os.environ.get("OGLS_DATA", Path(__file__).parents[3] / "shared" / "data"))
GOLD = Problem(id="gold", text="?", answer=r"\frac{1}{2}")
WRONG = {status: Verdict(correct=False, status=status) for status in ("timeout", "crash", "unparsable")}


@dataclass(frozen=True)
class Obedient(Verifier):
    """Does what the text says, to see what a worker may do."""

    def grade(self, problem: Problem, text: str) -> Verdict:
        command, _, argument = text.partition(" ")
        answer = None
        if command == "sleep":
            time.sleep(float(argument))
        elif command == "exit":
            os._exit(int(argument))
        elif command == "raise":
            raise RuntimeError(argument)
        elif command == "memory":
            answer = str(len(bytearray(int(argument))))
        elif command == "python":
            answer = str(eval(argument))
        elif command == "ignore":
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                pass
        return Verdict(correct=True, status="graded", answer=answer or text)

    def canonical(self, problem: Problem) -> str:
        return problem.answer


@pytest.fixture(scope="module")
def pool() -> Iterator[GradingPool]:
    with GradingPool(ByKind(), timeout=1.5) as pool:
        yield pool


@pytest.fixture(scope="module")
def obedient() -> Iterator[GradingPool]:
    with GradingPool(Obedient(), workers=2, timeout=0.5) as pool:
        tell(pool, "warm")  # loading is not what is timed
        yield pool


def tell(pool: GradingPool, *texts: str) -> list[Verdict]:
    return pool.grade([(GOLD, text) for text in texts])


def in_thread(call: object, *arguments: object) -> list[Verdict]:
    found: list[Verdict] = []
    thread = threading.Thread(target=lambda: found.extend(call(*arguments)))  # type: ignore[operator]
    thread.start()
    thread.join()
    return found


def payloads(marker: Path) -> list[str]:
    touch = f"touch {marker}"
    return [
        f"__import__('os').system('{touch}')",
        f"\\text{{__import__('os').system('{touch}')}}",
        f"eval(\"__import__('os').system('{touch}')\")",
        f"open('{marker}','w')",
        f"[c for c in ().__class__.__base__.__subclasses__()][0]; open('{marker}','w')",
        f"sympify(\"__import__('os').system('{touch}')\")",
        f"\\input{{|{touch}}}",
        f"\\write18{{{touch}}}",
        f"$({touch})",
        f"`{touch}`",
        f"${{__import__('os').system('{touch}')}}$",
        f"lambda: __import__('os').system('{touch}')",
    ]


def hostile(marker: Path) -> list[str]:
    boxed = [
        "9^{9^{9^9}}",
        "9^9^9^9^9",
        "9**9**9**9",
        "(9^9)^{(9^9)^{(9^9)}}",
        "10^{10^{10}}",
        "x^{99999999999}",
        "(x+1)^{9999}",
        "(x+y+z+w)^{200}-(w+z+y+x)^{200}",
        "2^{2^{2^{2^{2^2}}}}",
        "100000000!",
        "((99!)!)!",
        "9999!!!!!!",
        r"\binom{1000000000}{500000000}",
        r"\sum_{n=1}^{1000000000} \frac{1}{n^2}",
        r"\prod_{n=1}^{100000000} n",
        r"\int_0^1 \frac{\sin(x^x)}{\ln(x+e^{x^x})} dx",
        r"\int e^{x^3}\sin(x^5)\ln(x)^{7} dx",
        r"\lim_{x\to 0} \frac{\sin(\tan(x))-\tan(\sin(x))}{x^7}",
        r"\frac{1}{" * 60 + "x" + "}" * 60,
        r"\sqrt{" * 12 + "2" + "}" * 12,
        "(" * 5000 + "1" + ")" * 5000,
        "{" * 100_000,
        "(" * 12 + "1",
        "9" * 200_000,
        "9" * 399,
        "1." + "0" * 390 + "1",
        "1e999999999",
        "0x" + "f" * 300,
        "-" * 390 + "1",
        "+".join("x" * 150),
        "^".join("2" * 100),
        r"\frac" * 70,
        r"\begin{pmatrix}" + "1&" * 150 + r"\end{pmatrix}",
        r"\begin{matrix}" * 20,
        "5\x00",
        "\ud800\udfff",
        "\ud83d",
        "\u202e5\u202c",
        "\U0001f600" * 50,
        "٣",
        "\uff15",
        r"\frac{1}{0}",
        r"0^0",
        r"\infty-\infty",
        "nan",
        r"\emptyset",
        r"x=x=x=x=x",
        ",".join(["1"] * 190),
        r"\log_{0}(0)",
        r"\gcd(10^{4000}, 3)",
        "\r\n\t",
    ]
    bare = ["", "\x00" * 1000, "\ud800" * 1000, r"\boxed{" * 20_000, "{}" * 50_000, "<answer>" * 10_000, "\\" * 100_001]
    bare += [
        "\\boxed" + " " * 100_000,
        "1" * 200_000,
        "\\boxed{" + "{}" * 50_000 + "}",
        r"\boxed{1}" * 20_000 + "}" * 9,
    ]
    return [f"\\boxed{{{answer}}}" for answer in boxed + payloads(marker)] + bare


@pytest.mark.fault("verifier hangs, dies or eats memory")
@pytest.mark.parametrize("call", [lambda grade, answers: grade(answers), in_thread], ids=["main", "thread"])
def test_hostile_corpus(
    pool: GradingPool, tmp_path: Path, call: object, record_property: Callable[[str, object], None]
) -> None:
    texts = hostile(tmp_path / "executed")
    assert len(texts) >= 70
    answers = [(GOLD, text) for text in texts] + [(GOLD, r"\boxed{0.5}")]
    start = time.monotonic()
    *verdicts, last = call(pool.grade, answers)  # type: ignore[operator]
    seconds = time.monotonic() - start
    assert last == Verdict(correct=True, status="graded", answer="1/2")
    assert [text for text, verdict in zip(texts, verdicts, strict=True) if verdict.correct] == []
    slow = sum(verdict.status == "timeout" for verdict in verdicts)
    assert seconds < slow * (pool.timeout + 1) + 10
    assert not (tmp_path / "executed").exists()
    record_property("tried", len(texts))
    record_property("figure", f"{len(texts)} hostile answers in {seconds:.1f} s, {slow} of them by the time limit")


@pytest.mark.fault("model text executed")
def test_payloads_reach_no_evaluation_in_any_verifier(pool: GradingPool, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    entries = [
        ReasoningGym(name, size=2)[0] for name in ("countdown", "simple_integration", "n_queens", "binary_matrix")
    ]
    others = [Problem(id="c", text="?", answer="B", kind="mcq"), Problem(id="t", text="?", answer="[]", kind="tooluse")]
    answers = [
        (problem, form.format(payload))
        for problem in [*entries, *others]
        for payload in payloads(marker)
        for form in ("<answer>{}</answer>", "Action: a\nAction Input: {}")
    ]
    assert not any(verdict.correct for verdict in pool.grade(answers))
    assert not marker.exists()


def test_order_and_repetition(pool: GradingPool) -> None:
    answers = [(Problem(id=str(i), text="?", answer=str(i)), f"\\boxed{{{i + i % 2}}}") for i in range(500)]
    verdicts = pool.grade(answers)
    assert [verdict.correct for verdict in verdicts] == [i % 2 == 0 for i in range(500)]
    assert [verdict.answer for verdict in verdicts] == [str(i + i % 2) for i in range(500)]
    assert pool.grade([]) == []


def test_threads_take_turns(pool: GradingPool) -> None:
    results: dict[int, list[bool]] = {}

    def work(number: int) -> None:
        problem = Problem(id="p", text="?", answer=str(number))
        results[number] = [v.correct for v in pool.grade([(problem, f"\\boxed{{{i}}}") for i in range(8)])]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [i == number for i in range(8)] for number in range(8)}


def test_workers_never_import_heavy_libraries(pool: GradingPool) -> None:
    tell(pool, "")
    assert pool.modules is not None
    assert "sympy" in pool.modules
    roots = {module.partition(".")[0] for module in pool.modules}
    assert not roots & {"torch", "lightning", "transformers", "vllm", "datasets", "mlflow", "scipy"}


def test_only_what_the_kinds_of_problems_need_is_loaded() -> None:
    """reasoning-gym brings matplotlib, and takes longer to load than all else."""
    [puzzle] = ReasoningGym("chain_sum", size=1)
    with GradingPool(ByKind(), timeout=5.0) as pool:
        assert tell(pool, "\\boxed{1/2}")[0].correct
        assert pool.modules is not None
        assert not {"reasoning_gym", "matplotlib"} & set(pool.modules)
        asked = [(puzzle, f"<answer>{puzzle.answer}</answer>"), (GOLD, "\\boxed{1/2}"), (puzzle, "<answer>x</answer>")]
        assert [verdict.correct for verdict in pool.grade(asked)] == [True, True, False]
        assert {"reasoning_gym", "sympy"} <= set(pool.modules)


@pytest.mark.fault("verifier hangs, dies or eats memory")
def test_a_slow_answer_is_a_timeout_and_harms_no_other(obedient: GradingPool) -> None:
    for text in ("sleep 60", "ignore"):
        start = time.monotonic()
        before, slow, after = tell(obedient, "before", text, "after")
        assert time.monotonic() - start < obedient.timeout + 1
        assert (before.answer, slow, after.answer) == ("before", WRONG["timeout"], "after")


@pytest.mark.fault("verifier hangs, dies or eats memory")
def test_a_death_is_a_crash_and_harms_no_other(obedient: GradingPool) -> None:
    texts = ["before", "exit 3", "raise oh", f"memory {4 << 30}", "python 1/0", "between", "exit 0", "after"]
    verdicts = tell(obedient, *texts)
    assert [v.status == "crash" for v in verdicts] == [False, True, True, True, True, False, True, False]
    assert [v.answer for v in verdicts if v.correct] == ["before", "between", "after"]


@pytest.mark.fault("verifier hangs, dies or eats memory")
def test_replacement_takes_less_than_a_second() -> None:
    """Of 20 in a row, most take less than a quarter of one; the median, since the machine may be busy for a while."""
    with GradingPool(Obedient(), workers=2, timeout=60.0) as pool:
        tell(pool, "warm")
        seconds = []
        for _ in range(20):
            start = time.monotonic()
            assert tell(pool, "exit 1") == [WRONG["crash"]]
            seconds.append(time.monotonic() - start)
    assert sorted(seconds)[10] < 0.25


@pytest.mark.fault("model text executed")
def test_worker_is_confined(obedient: GradingPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = [
        f"open({str(tmp_path / 'written')!r}, 'w')",
        f"__import__('os').system('touch {tmp_path / 'written'}')",
        f"__import__('os').open({str(tmp_path / 'written')!r}, 66)",
        "__import__('subprocess').run('true')",
        "__import__('socket').socket()",
        "__import__('os').fork()",
        "__import__('os').kill(1, 0)",
        "__import__('ctypes').CDLL(None)",
    ]
    assert tell(obedient, *(f"python {attempt}" for attempt in attempts)) == [WRONG["crash"]] * len(attempts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("secrets leak")
def test_environment_is_scrubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OGLS_TEST_SECRET", "hunter2")
    with GradingPool(Obedient()) as pool:
        (verdict,) = tell(pool, "python dict(__import__('os').environ)")
    assert verdict.answer is not None
    assert "PATH" in verdict.answer
    assert "SECRET" not in verdict.answer


@pytest.mark.fault("verifier hangs, dies or eats memory")
@pytest.mark.parametrize("workers", [1, 2])
def test_pool_survives_the_death_of_its_processes(workers: int) -> None:
    with GradingPool(Obedient(), workers=workers, timeout=5.0) as pool:
        first = tell(pool, "python __import__('os').getpid()", "python __import__('os').getppid()")
        worker, nursery = (int(verdict.answer or "") for verdict in first)
        os.kill(worker, signal.SIGKILL)
        assert tell(pool, "again")[0].status in ("graded", "crash")  # the answer that found it dead is lost
        assert tell(pool, "again")[0].correct
        os.kill(nursery, signal.SIGKILL)
        tell(pool, "exit 1")
        assert tell(pool, "again")[0].correct


def test_no_process_outlives_the_pool() -> None:
    with GradingPool(Obedient(), workers=2) as pool:
        answers = tell(pool, *["python __import__('os').getpid()", "python __import__('os').getppid()"] * 4)
    processes = {int(verdict.answer or "") for verdict in answers}
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{process}").exists() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [process for process in processes if Path(f"/proc/{process}").exists()] == []
    assert tell(pool, "again")[0].correct
    pool.close()
    pool.close()


@pytest.mark.fault("verifier hangs, dies or eats memory")
def test_no_process_outlives_a_killed_trainer(tmp_path: Path) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(
        "import sys, time\n"
        "from ogls.tasks.grading import GradingPool\n"
        "from ogls.records import Problem\n"
        "from test_grading import Obedient\n"
        "pool = GradingPool(Obedient(), timeout=600.0)\n"
        "gold = Problem(id='p', text='', answer='')\n"
        "found = pool.grade([(gold, f'python __import__(\"os\").get{p}pid()') for p in ('', 'p')])\n"
        "print(*(v.answer for v in found), flush=True)\n"
        "pool.grade([(gold, 'ignore')])\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    trainer = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert trainer.stdout is not None
    processes = [int(process) for process in trainer.stdout.readline().split()]
    assert len(processes) == 2
    time.sleep(0.2)
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    deadline = time.monotonic() + 5

    def alive(process: int) -> bool:
        state = Path(f"/proc/{process}/stat")
        return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"

    while any(map(alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(alive, processes))


def test_idle_costs_nothing(obedient: GradingPool) -> None:
    worker = int(tell(obedient, "python __import__('os').getpid()")[0].answer or "")

    def ticks() -> list[str]:
        return Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[11:13]

    before = ticks()
    time.sleep(0.3)
    assert ticks() == before


@pytest.mark.parametrize("name", ["gsm8k", "aime24", "sciknoweval", "tooluse"])
def test_every_gold_answer_of_the_data_verifies(pool: GradingPool, name: str) -> None:
    files = sorted((DATA / name).glob("*.jsonl"))
    if not files:
        pytest.skip(f"no data in {DATA / name}; OGLS_DATA names the folder that holds it")
    for file in files:
        assert gold_faults(JsonlProblems(str(file)), pool) == {}


@pytest.mark.fault("gold answer that cannot verify itself")
def test_verify_gold(pool: GradingPool) -> None:
    fine = [Problem(id=f"fine-{i}", text="?", answer=str(i)) for i in range(50)]
    odd = [Problem(id=f"odd-{i}", text="?", answer="E", kind="mcq") for i in range(25)]
    assert gold_faults(fine, pool) == {}
    assert list(gold_faults([*fine, odd[3]], pool)) == ["odd-3"]
    said = complaint(fine + odd, gold_faults(fine + odd, pool))
    assert re.search(r"25 did not: odd-0, odd-1, .*odd-19 and 5 more", said)
    faults = gold_faults([*fine, Problem(id="p", text="?", answer="1", kind="poem")], pool)
    assert faults.keys() == {"p"}
    assert "no verifier for kind 'poem'" in faults["p"]


def state(process: int) -> str:
    """A letter: T is stopped, Z has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def wait_for(wanted: str, process: int) -> None:
    deadline = time.monotonic() + 5
    while state(process) != wanted:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def stop(process: int) -> None:
    os.kill(process, signal.SIGSTOP)
    wait_for("T", process)


@pytest.mark.fault("verifier hangs, dies or eats memory")
@pytest.mark.parametrize("who", ["worker", "nursery", "both"])
@pytest.mark.parametrize(
    "length",
    [
        pytest.param(10, id="short", marks=pytest.mark.slow),
        pytest.param(1_000_000, id="long"),
    ],  # more than a socket holds
)
def test_stopped_processes_are_replaced_and_the_innocent_answers_asked_again(who: str, length: int) -> None:
    with GradingPool(Obedient(), timeout=1.0) as pool:
        first = tell(pool, "python __import__('os').getpid()", "python __import__('os').getppid()")
        worker, nursery = (int(verdict.answer or "") for verdict in first)
        for process in {"worker": [worker], "nursery": [nursery], "both": [nursery, worker]}[who]:
            stop(process)
        start = time.monotonic()
        texts = ["a" * length, "exit 1", "b" * length, "sleep 60", "c" * length]
        verdicts = tell(pool, *texts)
        assert time.monotonic() - start < 30
        assert [v.status for v in verdicts] == ["graded", "crash", "graded", "timeout", "graded"]
        assert [v.answer for v in verdicts if v.correct] == texts[::2]
    for process in (worker, nursery):
        wait_for("Z", process)  # stopped processes are ended, too


@pytest.mark.fault("verifier hangs, dies or eats memory")
def test_a_stopped_process_does_not_keep_the_pool_from_closing() -> None:
    pool = GradingPool(Obedient())
    (verdict,) = tell(pool, "python __import__('os').getppid()")
    nursery = int(verdict.answer or "")
    stop(nursery)
    start = time.monotonic()
    pool.close()
    assert time.monotonic() - start < 5
    wait_for("Z", nursery)


@pytest.mark.fault("verifier hangs, dies or eats memory")
def test_a_worker_that_is_dead_before_it_is_asked_costs_no_answer() -> None:
    with GradingPool(Obedient()) as pool:
        (verdict,) = tell(pool, "python __import__('os').getpid()")
        os.kill(int(verdict.answer or ""), signal.SIGKILL)
        time.sleep(0.2)
        assert [v.answer for v in tell(pool, "a", "b", "c")] == ["a", "b", "c"]


@pytest.mark.fault("verifier hangs, dies or eats memory")
@pytest.mark.parametrize("workers", [1, 2])
def test_time_outs_of_one_call_have_a_budget(workers: int) -> None:
    texts = [text for i in range(8) for text in (f"before {i}", "ignore")]
    with GradingPool(Obedient(), workers=workers, timeout=5.0, timeout_budget=5.0) as pool:
        tell(pool, "warm")
        start = time.monotonic()
        verdicts = tell(pool, *texts)
        seconds = time.monotonic() - start
        assert [v.status for v in verdicts] == ["graded", "timeout"] * 8
        assert seconds < 5 + 7 * 0.5 + 15, "8 time-outs of 5 s would take 40 s"
        assert 5 + 6 * 0.5 - 1e-6 < pool.timeout_seconds < 5 + 7 * 0.5 + (workers - 1) * 5 + 1e-6
        start = time.monotonic()
        assert tell(pool, "ignore") == [WRONG["timeout"]]
        assert time.monotonic() - start > 4.9, "every call has its own budget"
        assert pool.timeout_seconds == 5.0


@dataclass(frozen=True)
class Unloadable(Obedient):
    def warm_up(self, kinds: Collection[str]) -> None:
        raise ImportError("nothing there")


def test_a_verifier_that_cannot_be_loaded(capfd: pytest.CaptureFixture[str]) -> None:
    pool = GradingPool(Unloadable())
    with pytest.raises(RuntimeError, match=r"could not load the verifier \(exit code 1\)"):
        tell(pool, "x")
    assert "ImportError: nothing there" in capfd.readouterr().err
    pool.close()


@pytest.mark.parametrize("settings", [{"workers": 0}, {"timeout": 0.0}, {"memory_gib": 0.1}, {"timeout_budget": -1.0}])
def test_settings(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"expected workers >= 1, timeout > 0 and memory_gib >= 0\.5"):
        GradingPool(Obedient(), **settings)  # type: ignore[arg-type]
