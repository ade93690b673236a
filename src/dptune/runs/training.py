"""The training of one run: its parts put together, and what each step leaves in the run's folder."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from dptune.config.schema import Config
from dptune.data.encoding import Encoded, encode_examples
from dptune.data.sources import public_examples, start_sources
from dptune.identity import kept_key, local_key
from dptune.models import adapters
from dptune.models.state import AdapterState
from dptune.privacy.allocation import lora_group_weights
from dptune.privacy.gradients import Engine
from dptune.privacy.guarantee import epsilon_text, rounded_up
from dptune.privacy.independence import check_bits
from dptune.privacy.ledger import WriteAheadLedger
from dptune.privacy.mechanism import Mechanism, groups_of
from dptune.privacy.plan import PrivacyPlan
from dptune.records import mirror as tracking
from dptune.records.code import code_version
from dptune.records.record import CHECKPOINT_FOLDER, HISTORY_FILE, LEDGER_FILE, GroupPrivacy, Privacy
from dptune.runs.engine import probes
from dptune.runs.folder import RunFolder
from dptune.runs.privacy import epsilon_marks, privacy_of
from dptune.runs.setup import Setup, training_rows
from dptune.sweeps.progress import in_time
from dptune.training import checkpoint
from dptune.training.checkpoint import Checkpoint
from dptune.training.loop import Batches, PrivatePath, Step, train
from dptune.training.projection import FullSpace, make_projection
from dptune.training.ranks import Ranks


class AdapterTraining:
    """Trains the adapter of a run in place, and writes ledger, checkpoints and history."""

    def __init__(
        self,
        config: Config,
        setup: Setup,
        ranks: Ranks,
        start: Checkpoint | None,
        folder: RunFolder | None = None,
        tracker: tracking.Tracker = tracking.NONE,
    ) -> None:
        """Put the parts together; a subspace of private gradients is paid for and found here.

        Args:
            config: of the run.
            setup: its parts.
            ranks: the processes that do it together.
            start: go on from there.
            folder: where to write; None for a process that leaves this to another one.
            tracker: gets the history.
        """
        self.config, self.setup, self.ranks, self.start = config, setup, ranks, start
        self.folder, self.tracker = folder, tracker
        plan, keys, model = setup.plan, setup.keys, setup.model
        adapters.set_modes(model)
        self.parameters = adapters.trainable_parameters(model)
        self.groups = groups_of({name: value.shape for name, value in self.parameters.items()}, plan.grouping)
        self.ledger: WriteAheadLedger | None = None
        if plan.private and folder is not None:
            self.ledger = ledger_of(setup, folder.path)
            if plan.one_shot and start is None:
                self.ledger.begin(0, checkpoint.hash_of(self.parameters))
            if start is not None:
                self.ledger.seen(start.step)  # It may have died between checkpoint and ledger.
        rows = training_rows(setup, config.environment.sequence_length, config.data.template)
        sampler = plan.sampler(keys, users=[example.user for example in setup.data.train])
        self.batches = Batches(rows, sampler, setup.path.ladder, config.compute.device)
        engine = setup.path.start(model)
        projection: FullSpace = make_projection(
            config,
            self.groups,
            plan=plan,
            keys=keys,
            engine=engine,
            private_rows=[rows[row] for row in sampler.all_rows.tolist()],
            public_rows=self._public_rows,
            ladder=setup.path.ladder,
            stored=start.state["projection"] if start else None,
        )
        if plan.private and config.privacy.projection != "none":
            self._check_projection(engine, projection)
        self.path = PrivatePath(engine, projection, Mechanism(plan, projection.groups, keys))
        self.history = list(start.history) if start else []
        self._written = len(self.history)
        self._shown = 0
        self._marks: dict[int, float | None] = {}

    def run(self) -> Privacy:
        """Do all steps that are left, and say what they guarantee."""
        plan, keys = self.setup.plan, self.setup.keys
        try:
            for step in train(
                self.parameters,
                self.batches,
                self.path,
                groups=self.groups,
                hyperparameter=self.config.hyperparameter,
                environment=self.config.environment,
                before_step=self._before_step,
                after_step=lambda step, released: adapters.after_step(self.setup.model, step, released),
                ranks=self.ranks,
                adapter=AdapterState(self.setup.model),
                start=self.start,
            ):
                self._after_step(step)
        except Exception as error:
            if self.folder is not None and keys.mode == "secure" and not isinstance(error, OSError):
                # That it failed may be due to what it drew: drawing again for free would be choosing. A new attempt
                # counts.
                checkpoint.remove(self.folder.path / CHECKPOINT_FOLDER)
            raise
        finally:
            self.path.engine.close()
        noise = {
            group.name: GroupPrivacy(
                group.dimension, self.history[-1][f"noise_std/{group.name}"] * plan.expected_batch_size
            )
            for group in self.path.projection.groups
        }
        guarantee = privacy_of(plan, self.config, self.setup.data, plan.steps, noise)
        return dataclasses.replace(guarantee, attempts=self.ledger.attempts if self.ledger else 0)

    def _check_projection(self, engine: Engine, projection: FullSpace) -> None:
        """Raise unless the coordinates of a row are its own to the last bit, as its gradient is."""
        vocabulary, ladder = len(self.setup.backbone.tokenizer), self.setup.path.ladder
        check_bits(
            lambda batch: dict(projection.project(engine(batch)[1])),
            list(probes(ladder, vocabulary, self.config.compute.device)),
        )

    def _public_rows(self) -> list[Encoded]:
        """The encoded records of the public sources in turn; without a start, of those that belong to the data."""
        config = self.config
        if sources := start_sources(config, self.setup.data).values():
            public = [example for row in zip(*(source.examples for source in sources), strict=False) for example in row]
        else:
            public = public_examples(config, self.setup.data)
        backbone, template = self.setup.backbone, config.data.template
        begin = backbone.layout.beginning(template)
        return encode_examples(public, backbone.tokenizer, config.environment.sequence_length, template, begin)

    def _before_step(self, step: int) -> None:
        if self.folder is not None:
            self.folder.lock.check()
        if self.ledger is not None:
            self.ledger.begin(step, checkpoint.hash_of(self.parameters))
        self.ranks.barrier()
        if self.setup.plan.allocation.row.takes_weights:
            # Weights of the adapter as it is now are a function of past releases: free (SPECIFICATION.md 2.5).
            named = self.setup.model.named_parameters()
            norms = {name: float(value.detach().square().sum()) for name, value in named}
            self.path.mechanism.set_public_weights(lora_group_weights(self.groups, norms))

    def _after_step(self, step: Step) -> None:
        # What earlier attempts cost is known once a step was begun.
        self._marks = self._marks or epsilon_marks(self.setup.plan, self.ledger.rows if self.ledger else ())
        self.history.append(history_row(step, self._marks.get(step.step)))
        if self.folder is None:
            return
        steps = self.setup.plan.steps
        if step.step % self.config.compute.checkpoint_every == 0 or step.step == steps:
            self._let_out(step, self.folder)
        self.folder.steps(step.step, steps)
        if step.step in self._marks:
            self.folder.log(progress(step, self.setup.plan, self.config, self._marks[step.step]))

    def _let_out(self, step: Step, folder: RunFolder) -> None:
        """Make a checkpoint, and show its rows only then: what was seen is never drawn again with other noise."""
        folder.lock.check()
        position = self.ledger.position if self.ledger else ""
        made = Checkpoint(step.step, step.seconds, self.history, step.state(), position)
        checkpoint.save(folder.path / CHECKPOINT_FOLDER, made, self.setup.stamp, kept_key(folder.path.parent))
        if self.ledger is not None:
            self.ledger.seen(step.step)
        with (folder.path / HISTORY_FILE).open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in self.history[self._written :])
        self._written = len(self.history)
        for row in self.history[self._shown :]:
            self.tracker.step(row)
        self._shown = len(self.history)


def load_checkpoint(setup: Setup, folder: Path) -> Checkpoint | None:
    """The checkpoint of a run. Raises CheckpointError when it cannot go on from there."""
    return checkpoint.load_checkpoint(folder / CHECKPOINT_FOLDER, setup.stamp, local_key(folder.parent))


def ledger_of(setup: Setup, folder: Path) -> WriteAheadLedger:
    """The ledger of a private run, opened."""
    return WriteAheadLedger(
        folder / LEDGER_FILE, setup.plan, setup.keys, setup.keys.run, code_version(), stand_in=setup.data.public
    )


def progress(step: Step, plan: PrivacyPlan, config: Config, epsilon: float | None) -> str:
    """Steps, examples a second, epsilon spent, time left."""
    rate = step.step * plan.expected_batch_size / step.seconds
    left = step.seconds / step.step * (plan.steps - step.step)
    target = f" of {config.privacy.target_epsilon:g}" if config.privacy.target_epsilon else ""
    so_far = "non-private" if epsilon is None else f"epsilon {epsilon_text(epsilon)}{target}"
    rest = f"  {in_time(left)} left" if step.step < plan.steps else ""
    return f"step {step.step}/{plan.steps}  {rate:.0f} examples/s  {so_far}{rest}"


def history_row(step: Step, epsilon: float | None) -> dict[str, Any]:
    """One line of `history.jsonl`; keys that begin with NON_PRIVATE/ must not be published."""
    return {
        "step": step.step,
        "learning_rate": step.learning_rate,
        "epsilon": None if epsilon is None else rounded_up(epsilon),
        "noise_multiplier": step.effective_noise_multiplier,
        "NON_PRIVATE/seconds": round(step.seconds, 3),
        **{f"noise_std/{group}": value for group, value in step.noise_std.items()},
        **{key: value if math.isfinite(value) else None for key, value in step.telemetry.items()},
    }
