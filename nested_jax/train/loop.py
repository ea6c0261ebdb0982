"""The training loop: resume, update, evaluate, save, report."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from nested_jax.data import Batch
from nested_jax.errors import UserError
from nested_jax.parallel import processes
from nested_jax.parallel.chips import peak_flops
from nested_jax.parallel.flops import flops
from nested_jax.train import folder as folders
from nested_jax.train import layers, report
from nested_jax.train.checkpoint import Checkpoints
from nested_jax.train.config import TrainConfig, command, flatten
from nested_jax.train.divergence import Running
from nested_jax.train.optimizer import learning_rate, optimizer
from nested_jax.train.progress import Display, print_line
from nested_jax.train.record import Record, assert_rows, read_rows
from nested_jax.train.source import Source, open_source
from nested_jax.train.state import (
    Places,
    TrainState,
    batch_shapes,
    divided,
    init_train_state,
    open_mesh,
    places_of,
    shapes_of,
)
from nested_jax.train.step import Metrics, assert_healthy, train_step
from nested_jax.train.stopping import Diverged, Interrupted, Interruption
from nested_jax.train.trained import load_run
from nested_jax.typing import PyTree


def train(config: TrainConfig, console: Console | None = None) -> TrainState:
    """Trains in `config.run_dir`, from where a run in it stopped.

    The folder gets config.json, metrics.jsonl, tensorboard/, checkpoints/, with text tokenizer.model, at the end loss.png
    and report.md. A run that was stopped and resumed has the state and metrics, to the bit, of one that was not. A lower
    `learning_rate` than that of a run which has diverged resumes it from the last checkpoint before.

    Args:
        config: of the run.
        console: where progress is shown; None: the standard output.

    Returns:
        The state after `config.steps` updates.

    Raises:
        UserError: config, text and folder do not fit; nothing in the folder has changed.
        Diverged: the loss has risen by more than `config.max_loss_rise`, or (NonFinite) a number is not finite; checkpoints
            are kept.
        Interrupted: stopped by Ctrl-C, SIGTERM or SIGHUP after an update, and saved.
    """
    console, folder = console or Console(quiet=not processes.first()), Path(config.run_dir)
    state, progress, source = None, {}, None
    with contextlib.ExitStack() as stack:
        lock = lambda: stack.enter_context(folders.lock(folder)) or True
        locked = processes.of_first(lambda: folders.holds_run(folder) and lock())  # before anything in it is read
        _assert_shared(folder, locked)
        saved = folders.resumable(folder, config)
        shapes = shapes_of(f"the model of {config.preset} and --model flags", lambda: init_train_state(config))
        if mesh := open_mesh(config.mesh, divided(config)):
            stack.enter_context(jax.set_mesh(mesh))
        places = places_of(mesh, shapes, config.batch_size)
        open_own = lambda start: processes.in_each(lambda: open_source(config, start, places.rows))
        shapes = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places.state)
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(folder, partial(print_line, console))))
        if saved:
            if checkpoints.latest() is not None:
                state, progress = checkpoints.restore(shapes)
            assert_resumable(folder, saved, config, state, progress)
            if saved.data != config.data:
                source = open_own(folder)
                folders.assert_same_data(folder, source.fingerprint, source.name)
            if state is not None and state.step == config.steps and report.written(folder, config.steps):
                print_line(console, f"{folder} is finished: give more --steps to go on with it, or --fresh to start over")
                return state
        first = _first_weights(config, mesh) if state is None and config.init_from else None
        source = source or open_own(folder if saved else Path(config.init_from) if config.init_from else None)
        processes.assert_same(source.name, [source.fingerprint, *source.lines()])  # these depend on the tokenizer too
        if saved:
            folders.assert_same_data(folder, source.fingerprint, source.name)

        def claim() -> None:
            """Makes the folder this run's."""
            aside = folders.set_aside(folder) if config.fresh and not saved else None
            if aside:
                print_line(console, f"the run that was in {folder} is now in {aside}")
            if aside or not locked:
                lock()
                if folders.holds_run(folder):
                    began = f"another process has trained in {folder} since this one started"
                    raise UserError(f"{began}: give the same command again")
            folders.write_config(folder, dataclasses.replace(config, fresh=False), source.fingerprint)
            source.save(folder)

        processes.of_first(claim)
        _assert_shared(folder, True)
        if saved and config.learning_rate < saved.learning_rate and (step := _last_good(folder, checkpoints)):
            checkpoints.return_to(step)
            state, progress = checkpoints.restore(shapes)
            print_line(console, f"goes back to step {step}, before the loss rose, with a lower learning rate")
        if state is None:
            state = jax.jit(partial(init_train_state, config), out_shardings=places.state)(first)
        else:
            source.batches.set_state(progress["data"])
            state = jax.device_put(state, places.state)
        own = folder if processes.first() else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        record = stack.enter_context(contextlib.closing(Record(folder, int(state.step), into=own)))
        record.add_config(dict(flatten(config)))
        run = _Run(config, own, console, source, checkpoints, record, state, progress, places)
        run.print_start()
        run.compile()
        run.update()
        run.report()
        return run.state


class _Run:
    """The state of a run, and what reads and writes it."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,  # of what this process writes
        console: Console,
        source: Source,
        checkpoints: Checkpoints,
        record: Record,
        state: TrainState,
        progress: dict[str, Any],
        places: Places,
    ):
        self.config, self.folder, self.console, self.source, self.places = config, folder, console, source, places
        self.checkpoints, self.record = checkpoints, record
        self.state, self.step, self.tokens = state, int(state.step), progress.get("tokens", 0)
        self.compiling, self.evaluating = progress.get("compiling", 0.0), progress.get("evaluating", 0.0)
        self.running = Running(**progress.get("running", {"steps": self.step}))
        self._work: float | None = None  # seconds of an update's matrix products at the devices' greatest speed
        self._start = time.monotonic() - progress.get("seconds", 0.0)

    @property
    def seconds(self) -> float:
        """Wall time of this run, including that before it was resumed."""
        return time.monotonic() - self._start

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.state.params))

    def print_start(self) -> None:
        """Prints the model, the device, the data and the step that the run starts from."""
        config, (first, *others) = self.config, self.source.lines()
        where = f"from step {self.step}" if self.step else "from the start"
        where += f" with the weights of {config.init_from}" if config.init_from and not self.step else ""
        say = lambda line: print_line(self.console, line)
        say(f"{config.preset}, {self.size:,} parameters, {where}; Ctrl-C saves, the same command resumes")
        sizes = f"{config.batch_size * config.window:,} tokens an update, {first}"
        shape, kind = self.places.shape, jax.devices()[0].device_kind
        devices = math.prod(shape)
        where = f"{devices} x {kind}, mesh {shape}" if devices > 1 else kind
        where += f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
        say(f"on {where}, JAX {jax.__version__}; {sizes}")
        if idle := jax.device_count() - devices:
            say(f"note: {idle} of {jax.device_count()} devices have no part; give another --batch-size or --mesh")
        for line in others:
            say(line)
        slowest = max(config.model.cms.periods, default=0)
        if slowest > config.window and not config.carry:
            never = f"the CMS level of period {slowest} never steps within a window of {config.window}"
            say(f"note: {never}; give --carry or --window {2 * slowest}")

    def compile(self) -> None:
        """Compiles the update and the evaluation, once: arrays of other types or places would be an error."""
        config, start = self.config, time.monotonic()
        if self.step == config.steps:
            return
        step = train_step(config.model, optimizer(config), accumulate=config.accumulate)
        update = jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(self.places.state, self.places.batch),
            out_shardings=(self.places.state, None),
        )
        words = "compiling the training step and the evaluation"
        if self.console.is_terminal:
            waiting = self.console.status(words)
        else:
            print_line(self.console, words)
            waiting = contextlib.nullcontext()
        with waiting:
            self._update = update.lower(self.state, batch_shapes(config)).compile()
            self.source.compile(self.state.params)
            if config.show_surprise:
                self.source.layer_surprise(self.state.params)
        if peak := peak_flops(jax.devices()[0].device_kind):
            work = flops(step, *jax.eval_shape(lambda *both: both, self.state, batch_shapes(config)))
            self._work = work / (peak * math.prod(self.places.shape))
        self.compiling += time.monotonic() - start

    def update(self) -> None:
        """All remaining updates, with the evaluations, checkpoints and rows between them.

        Raises:
            Interrupted: after a signal, once the state is saved.
            Diverged: as `train`.
        """
        config, rate = self.config, learning_rate(self.config)
        shown = {"evaluations": self._evaluations_after, "unit": self.source.unit, "work": self._work}
        with Display(self.console, self.step, config.steps, **shown) as display:
            self._evaluate(display, lambda: False)  # before the first update, or where a signal has stopped it
            with Interruption(display.print_line) as interruption:
                stopped = lambda: bool(processes.total([interruption.signal or 0]).any())
                while self.step < config.steps and not stopped():
                    batch = next(self.source.batches)
                    self.state, metrics = self._update(self.state, self._placed(batch))
                    self.step += 1
                    self._assert_healthy(metrics)
                    targets, text_bytes = self._read(batch)
                    self.tokens += targets
                    row = {"loss": float(metrics.loss)}
                    row |= self.source.numbers(float(metrics.bits) * targets, text_bytes, self.tokens)
                    row |= device_memory()
                    speeds = display.update(self.step, targets, **row)
                    if self.step % config.log_every == 0 or self.step == config.steps:
                        row |= {
                            "gradient_norm": float(metrics.gradient_norm),
                            "update_norm": float(metrics.update_norm),
                            "learning_rate": float(jnp.asarray(rate(self.step - 1))),
                        }
                        row |= {"tokens": self.tokens, "seconds": self.seconds, **speeds}
                        self.record.add(self.step, **row)
                    self._evaluate(display, stopped)
                    if self.step % config.checkpoint_every == 0 or self.step == config.steps:
                        self._save()
                if stopped():
                    self._save()
                    where = f"stopped at step {self.step} of {config.steps}, saved in {config.run_dir}"
                    signals = processes.merged({str(jax.process_index()): interruption.signal})
                    raise Interrupted(f"{where}; resume with: {command(config)}", next(filter(None, signals.values())))

    def report(self) -> None:
        """Writes loss.png and report.md and prints where they are."""
        config, folder, seconds = self.config, self.folder, self.seconds
        row = self.record.heldout(self.step) or {}
        outcome = self.source.report(folder, self.state.params, self.record.rows, self.tokens)
        if outcome.sample is not None:
            self.record.add_text(self.step, "sample", outcome.sample)
        if config.show_surprise:
            outcome = outcome._replace(sections=[*outcome.sections, layers.section(row)])
        costs = report.Costs(self.size, self.tokens, seconds, self.compiling, self.evaluating)
        report.write(folder, config, outcome, costs)
        print_line(self.console, self.source.summary(row))
        print_line(self.console, f"{folder / report.REPORT} has the rest; {self.source.farewell(folder)}")

    def _placed(self, batch: Batch) -> Batch:
        """A batch on the devices of all processes."""
        return processes.put(batch, self.places.rows, self.places.batch, self.config.batch_size)

    def _read(self, batch: Batch) -> tuple[int, float]:
        """Targets of an update, and bytes of text that they stand for, in all processes together."""
        rows, counted = self.places.rows, self.places.counted
        if len(counted) < len(rows):
            batch = batch._replace(weights=batch.weights * np.isin(rows, counted)[:, None])
        targets, text_bytes = processes.total([batch.weights.sum(), self.source.text_bytes(batch)])
        return int(targets), float(text_bytes)

    def _evaluations_after(self, step: int) -> int:
        """How many evaluations come after a step."""
        every, last = self.config.eval_every, self.config.steps
        return (last > step) + ((last - 1) // every - step // every if every and last > step else 0)

    def _evaluate(self, display: Display, stop: Callable[[], bool]) -> None:
        """Evaluates, if this step is one of those to evaluate at and not evaluated yet."""
        every, last = self.config.eval_every, self.step == self.config.steps
        if not (last or (every and self.step % every == 0)) or self.record.heldout(self.step):
            return
        params, start = self.state.params, time.monotonic()
        with display.evaluating():
            row = self.source.evaluate(params, stop)
            surprise = self.source.layer_surprise(params) if row is not None and self.config.show_surprise else {}
        self.evaluating += time.monotonic() - start
        if row is None:
            return
        self.record.add(self.step, **row, **surprise)
        display.print_line(f"step {self.step}/{self.config.steps}  {self.source.summary(row)}")
        if surprise:
            display.print_table(layers.table(surprise))

    def _save(self) -> None:
        times = {"seconds": self.seconds, "compiling": self.compiling, "evaluating": self.evaluating}
        progress = {"tokens": self.tokens, **times, "running": self.running._asdict()}
        data = processes.merged(self.source.batches.get_state())
        progress |= {"data": data, "rows": self.record.count(self.step)}
        self.checkpoints.save(self.state, progress, before=self.running.best, wait=False)

    def _assert_healthy(self, metrics: Metrics) -> None:
        """Raises Diverged where a number is not finite or the loss has risen too far, and notes the last good step."""
        before, most = self.running, self.config.max_loss_rise
        try:
            assert_healthy(self.step, metrics, self.config.model)
            self.running = before.after(float(metrics.loss), float(metrics.update_norm))
            if (rise := self.running.rise(self.config.model.vocabulary)) <= most:
                return
            loss = f"the mean loss of the last updates is {self.running.loss:.4g}, {rise:.3g} nats above its least"
            norm = f"the last update's norm {float(metrics.update_norm):.3g}, a mean one's {before.update_norm:.3g}"
            raise Diverged(f"step {self.step}: {loss} ({norm}); --max-loss-rise is {most:g}")
        except Diverged as error:
            good, config = self.checkpoints.last_before(self.running.best), self.config
            self.record.add(self.step, last_good_step=good or 0)
            again = command(dataclasses.replace(config, learning_rate=float(f"{config.learning_rate / 4:.2g}")))
            kept = f"the checkpoint of step {good}, before that, is kept; go on from it at a lower rate with: {again}"
            none = f"no good step was saved; start over at a lower rate with: {again} --fresh"
            raise type(error)(f"{error}; {none if good is None else kept}") from None


def device_memory() -> dict[str, float]:
    """{"memory": the most GB in use so far of any device of this process}; empty where devices have no `memory_stats`."""
    peaks = [stats["peak_bytes_in_use"] for device in jax.local_devices() if (stats := device.memory_stats())]
    return {"memory": max(peaks) / 1e9} if peaks else {}


def _assert_shared(folder: Path, holds_run: bool) -> None:
    """Raises UserError where `folders.holds_run` is not the same in all processes."""

    def check() -> None:
        if folders.holds_run(folder) != holds_run:
            fault = f"--run-dir {folder} is not the same folder in process {jax.process_index()}"
            raise UserError(f"{fault}: give one that all processes share")

    if jax.process_count() > 1:
        processes.in_each(check)


def _last_good(folder: Path, checkpoints: Checkpoints) -> int | None:
    """The last checkpoint before the step from which a run diverged; None where it has not, or has none."""
    good = max((row["last_good_step"] for row in read_rows(folder) if "last_good_step" in row), default=0)
    return checkpoints.last_before(good + 1)


def _first_weights(config: TrainConfig, mesh: Mesh | None) -> PyTree:
    """The weights of the run `config.init_from`, which must be one of the same model, in parts on the mesh."""
    theirs, weights, *_ = load_run(config.init_from or "", lay=lambda _: mesh)
    for (name, value), (_, own) in zip(flatten(theirs.model), flatten(config.model), strict=True):
        if value != own and name != "memory_policy":
            raise UserError(
                f"--init-from {config.init_from} has --model.{name} {value}, not {own}: leave out --preset and --model flags"
            )
    return weights


def assert_resumable(
    folder: Path, saved: TrainConfig, config: TrainConfig, state: TrainState | None, progress: dict[str, Any]
) -> None:
    """Raises UserError where resuming would lose rows or steps: of metrics, of checkpoints that are gone, beyond --steps."""
    last = max((row["step"] for row in read_rows(folder)), default=0)
    if state is None and last > saved.checkpoint_every:
        remedy = "put them back, or give --fresh to start over (the old run is kept under another name)"
        raise UserError(f"{folder} was trained to step {last}, and its checkpoints are gone: {remedy}")
    if state is not None:
        if state.step > config.steps:
            remedy = f"give --steps {state.step} or more"
            raise UserError(f"{folder} was trained to step {state.step}, beyond --steps {config.steps}: {remedy}")
        assert_rows(folder, int(state.step), progress["rows"])
