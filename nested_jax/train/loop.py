"""The training loop: resume, update, evaluate, save, report."""

from __future__ import annotations

import contextlib
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from nested_jax.data import NgramBits
from nested_jax.errors import UserError
from nested_jax.train import folder as folders
from nested_jax.train import layers, reading, report
from nested_jax.train.checkpoint import Checkpoints
from nested_jax.train.config import TrainConfig, command
from nested_jax.train.optimizer import learning_rate, optimizer
from nested_jax.train.progress import Display, print_line
from nested_jax.train.record import Record, assert_rows, read_rows
from nested_jax.train.sample import characters, sample
from nested_jax.train.state import TrainState, init_train_state
from nested_jax.train.step import Metrics, assert_healthy, train_step
from nested_jax.train.stopping import Interrupted, Interruption, NonFinite
from nested_jax.train.text import Text, open_text


def train(config: TrainConfig, console: Console | None = None) -> TrainState:
    """Trains in `config.run_dir`, from where a run in it stopped.

    The folder gets config.json, metrics.jsonl, tensorboard/, checkpoints/, tokenizer.model and, at the end, loss.png
    and report.md. A run that was stopped and resumed has the state and metrics, to the bit, of one that was not.

    Args:
        config: of the run.
        console: where progress is shown; None: the standard output.

    Returns:
        The state after `config.steps` updates.

    Raises:
        UserError: config, text and folder do not fit; nothing in the folder has changed.
        NonFinite: the loss, a gradient or the fast state is not finite; the last checkpoint is kept.
        Interrupted: stopped by Ctrl-C or SIGTERM, and saved.
    """
    console, folder = console or Console(), Path(config.run_dir)
    state, progress = None, {"tokens": 0, "seconds": 0.0}
    with contextlib.ExitStack() as stack:
        interruption = stack.enter_context(Interruption())
        if locked := folders.holds_run(folder):
            stack.enter_context(folders.lock(folder))  # before anything in it is read
        saved = folders.resumable(folder, config)
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(folder, partial(print_line, console))))
        text = None
        if saved:
            if checkpoints.latest() is not None:
                state, progress = checkpoints.restore(jax.eval_shape(lambda: init_train_state(config)))
            assert_resumable(folder, saved, config, state, progress)
            if saved.data != config.data:
                text = open_text(config, folder)
                folders.assert_same_text(folder, text.fingerprint)
            if state is not None and state.step == config.steps and report.written(folder, config.steps):
                print_line(console, f"{folder} is finished: give more --steps to go on with it, or --fresh to start over")
                return state
        text = text or open_text(config, folder if saved else None)
        if saved:
            folders.assert_same_text(folder, text.fingerprint)
        elif config.fresh and (aside := folders.set_aside(folder)):
            print_line(console, f"the run that was in {folder} is now in {aside}")
            locked = False
        if not locked:
            stack.enter_context(folders.lock(folder))
            if folders.holds_run(folder):
                began = f"another process has trained in {folder} since this one started"
                raise UserError(f"{began}: give the same command again")
        folders.write_config(folder, config, text.fingerprint)
        text.save(folder)
        if state is None:
            state = jax.jit(lambda: init_train_state(config))()
        else:
            text.batches.set_state(progress["data"])
        state = jax.device_put(state, jax.devices()[0])  # committed, whether new or restored: one program for both
        record = stack.enter_context(contextlib.closing(Record(folder, int(state.step))))
        run = _Run(config, console, text, checkpoints, record, state, progress)
        run.print_start()
        run.update(interruption)
        interruption.release()
        run.report()
        return run.state


class _Run:
    """The state of a run, and what reads and writes it."""

    def __init__(
        self,
        config: TrainConfig,
        console: Console,
        text: Text,
        checkpoints: Checkpoints,
        record: Record,
        state: TrainState,
        progress: dict[str, Any],
    ):
        self.config, self.console, self.text = config, console, text
        self.checkpoints, self.record = checkpoints, record
        self.state, self.step, self.tokens = state, int(state.step), progress["tokens"]
        self._start = time.monotonic() - progress["seconds"]

    @property
    def seconds(self) -> float:
        """Wall time of this run, including that before it was resumed."""
        return time.monotonic() - self._start

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.state.params))

    def print_start(self) -> None:
        """Prints the model, the text and the step that the run starts from."""
        config, heldout = self.config, self.text.heldout
        where = f"from step {self.step}" if self.step else "from the start"
        print_line(
            self.console, f"{config.preset}, {self.size:,} parameters, {where}; Ctrl-C saves, the same command resumes"
        )
        print_line(self.console, f"{config.data}: {self.text.summary}")
        print_line(self.console, f"{config.data}: {heldout.text_bytes:,} bytes held out, {_ngrams(self.text.ngrams)}")
        slowest = max(config.model.cms.periods, default=0)
        if slowest > config.window and not config.carry:
            never = f"the CMS level of period {slowest} never steps within a window of {config.window}"
            print_line(self.console, f"note: {never}; give --carry or --window {2 * slowest}")

    def update(self, interruption: Interruption) -> None:
        """All remaining updates, with the evaluations, checkpoints and rows between them.

        Raises:
            Interrupted: after a signal, once the state is saved.
            NonFinite: as `train`.
        """
        config = self.config
        update = jax.jit(train_step(config.model, optimizer(config), accumulate=config.accumulate), donate_argnums=0)
        rate = learning_rate(config)
        with Display(self.console, self.step, config.steps) as display:
            self._evaluate(interruption, display)  # in case a signal has stopped it before
            while self.step < config.steps and interruption.signal is None:
                batch = next(self.text.batches)
                self.state, metrics = update(self.state, batch)
                self.step += 1
                self._assert_healthy(metrics)
                targets = int(batch.weights.sum())
                text_bytes = float((self.text.tokenizer.byte_lengths[batch.targets] * batch.weights).sum())
                self.tokens += targets
                row = {"loss": float(metrics.loss), "bits_per_byte": float(metrics.bits) * targets / max(text_bytes, 1)}
                speed = display.update(self.step, targets, **row)
                if self.step % config.log_every == 0 or self.step == config.steps:
                    row |= {
                        "gradient_norm": float(metrics.gradient_norm),
                        "learning_rate": float(jnp.asarray(rate(self.step - 1))),
                    }
                    row |= {"tokens": self.tokens, "seconds": self.seconds, "tokens_per_second": speed}
                    self.record.add(self.step, **row)
                self._evaluate(interruption, display)
                if self.step % config.checkpoint_every == 0 or self.step == config.steps:
                    self._save()
            if interruption.signal is not None:
                self._save()
                where = f"stopped at step {self.step} of {config.steps}, saved in {config.run_dir}"
                raise Interrupted(f"{where}; resume with: {command(config)}", interruption.signal)

    def report(self) -> None:
        """Writes loss.png and report.md and prints where they are."""
        config, heldout = self.config, self.text.heldout
        row = self.record.heldout(self.step) or {}
        bits = row["heldout_bits_per_byte"]
        options = {"tokens": config.sample_tokens, "temperature": report.TEMPERATURE, "seed": config.seed}
        ids = sample(self.config.model, self.state.params, self.text.tokenizer, **options)
        folder = Path(config.run_dir)
        report.draw(folder, self.record.rows, self.text.ngrams)
        report.write(
            folder,
            config,
            bits_per_byte=bits,
            ngrams=self.text.ngrams,
            text_bytes=heldout.text_bytes,
            parameters=self.size,
            tokens=self.tokens,
            seconds=self.seconds,
            sample="".join(characters(self.text.tokenizer, ids)),
            reading=self._read(),
            layers=layers.section(row) if config.show_surprise else "",
        )
        print_line(self.console, f"held-out {bits:.3f} bits per byte, {_ngrams(self.text.ngrams)}")
        print_line(
            self.console, f"{folder / report.REPORT} has the rest; nested-jax generate --run-dir {folder} writes text"
        )

    def _read(self) -> str:
        """Draws reading.png and returns its section of the report; "" where no document is long enough."""
        config, documents = self.config, self.text.documents
        found = reading.read(config, self.state.params, self.text.tokenizer, documents)
        if found is None:
            return ""
        curves = {reading.COLUMNS[name]: curve for name, curve in found.curves().items()}
        reading.plot(curves, found.positions, Path(config.run_dir, reading.FIGURE))
        return reading.section(found)

    def _evaluate(self, interruption: Interruption, display: Display) -> None:
        """Evaluates, if this step is one of those to evaluate at and not evaluated yet."""
        every, last = self.config.eval_every, self.step == self.config.steps
        if not (last or (every and self.step and self.step % every == 0)) or self.record.heldout(self.step):
            return
        heldout = self.text.heldout
        bits = heldout.bits_per_byte(self.state.params, stop=lambda: interruption.signal is not None)
        if bits is not None:
            surprise = heldout.layer_surprise(self.state.params) if self.config.show_surprise else {}
            self.record.add(self.step, heldout_bits_per_byte=bits, **self.text.ngrams._asdict(), **surprise)
            step = f"step {self.step}/{self.config.steps}"
            display.print_line(f"{step}  held-out {bits:.3f} bits/byte, {_ngrams(self.text.ngrams)}")
            if surprise:
                display.print_table(layers.table(surprise))

    def _save(self) -> None:
        progress = {"tokens": self.tokens, "seconds": self.seconds, "data": self.text.batches.get_state()}
        progress["rows"] = self.record.count(self.step)
        self.checkpoints.save(self.state, progress)

    def _assert_healthy(self, metrics: Metrics) -> None:
        try:
            assert_healthy(self.step, metrics, self.config.model)
        except NonFinite as error:
            last = self.checkpoints.latest()
            kept = "nothing was saved yet" if last is None else f"the checkpoint of step {last} is kept"
            remedy = "try a lower --learning-rate or --clip, in another --run-dir"
            raise NonFinite(f"{error}; {kept}; {remedy}") from None


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


def _ngrams(ngrams: NgramBits) -> str:
    return f"counting tokens {ngrams.unigram:.3f}, pairs {ngrams.bigram:.3f}"
