"""The training loop, from a batch to an optimiser step."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from dinov2.checkpoint import Checkpoints
from dinov2.console import progress
from dinov2.data.sources import Source
from dinov2.logs import Metrics
from dinov2.losses.targets import next_centers
from dinov2.optim import Schedules, clip_gradients, set_rates, update_average
from dinov2.parallel import is_main
from dinov2.ssl.anchor import take
from dinov2.ssl.contrastive import contrastive_objective
from dinov2.ssl.objective import Outcome, merged, objective
from dinov2.train.config import TrainConfig
from dinov2.train.exports import export_if_asked
from dinov2.train.feed import feed, step_generator
from dinov2.train.gate import Gate, agree
from dinov2.train.hang import Heartbeat
from dinov2.train.rollback import Astray, Rollbacks
from dinov2.train.signals import StopSignals
from dinov2.train.state import State, save
from dinov2.train.watch import Watch


def train(config: TrainConfig, folder: Path, source: Source, state: State, rollbacks: Rollbacks) -> None:
    """Train from `state.step` to the end of the run, saving into `folder` on the way.

    Raises:
        RunAgain: a signal asked to stop; the state is saved.
        Astray: too many steps in a row were not finite, or the weights are not.
    """
    steps = config.length(len(source))
    device = next(state.student.parameters()).device
    schedules = Schedules(
        optim=config.optim, teacher=config.teacher, steps=steps, batch=config.batch, pictures=len(source)
    )
    checkpoints = checkpoints_of(config, folder)
    metrics = Metrics(folder, state.step, tensorboard=config.tensorboard, wandb=config.wandb)
    gate = Gate(folder, source, state.step, limit=config.max_skipped)
    heart = Heartbeat(folder, checkpoints, limit=config.watch.hang_limit)
    watch = Watch(config, folder, source, state, heart)
    bar = progress(total=steps, initial=state.step, what="train", unit="step", shown=is_main())
    outcome_of = objective_of(config)

    export_if_asked(config, folder, source, state)  # a kill may have come between a checkpoint and this
    if state.step == 0:
        metrics.write(0, watch.start(state))
    with StopSignals(config.signals) as stop, heart, checkpoints, metrics, bar:
        batches = feed(config, source, device, rollbacks.batch, first=state.step, last=steps)
        for views, fed in heart.over(batches, state.step):
            rates = schedules.at(state.step)
            set_rates(state.optimizer, rates)
            share = config.gram.share(state.step, steps)
            if state.anchor is not None and config.gram.due(state.step, steps):
                take(state.anchor, state.teacher)
            anchored = {} if state.anchor is None or not share else {"anchor": state.anchor}
            weights = config.weights() | {"gram": share * config.losses.gram}

            state.optimizer.zero_grad(set_to_none=True)
            generator = step_generator(config.seed, state.step, device)
            outcomes = []
            for part in views.parts(config.accumulate):
                with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    outcome = outcome_of(
                        state.student,
                        state.guide,
                        part,
                        rates,
                        state.centers,
                        generator=generator,
                        **anchored,
                    )
                (outcome.total(weights) / config.accumulate).backward()
                outcomes.append(outcome.detached())
            outcome = merged(outcomes)
            loss = outcome.total(weights)
            norms = clip_gradients(state.student.parts(), config.optim.clip, config.optim.clip_per)

            finite, stopping = agree(loss, norms, stop.asked)
            if finite:
                update_average(state.teacher, state.student, rates.momentum_before)
                state.optimizer.step()
                update_average(state.teacher, state.student, rates.momentum)
                moved = next_centers(state.centers, outcome.totals, config.teacher.center_momentum)
                state.centers = state.centers | moved
            gate.count(state, finite, stopping, outcome, fed)

            line = watch.step(loss, outcome, norms, rates, fed, state)
            metrics.write(state.step, line)
            bar.update()
            bar.set_postfix(loss=f"{line['loss']:.3f}", refresh=False)

            due = state.step % config.checkpoint.every == 0 or state.step == steps or stopping
            if due and not save(state, checkpoints):
                raise Astray("weights not finite", stopping=stopping)
            if due:
                export_if_asked(config, folder, source, state)
            if stopping and state.step < steps:
                checkpoints.wait()
                stop.leave(state.step, steps)


def objective_of(config: TrainConfig) -> Callable[..., Outcome]:
    """The method: what is learnt from student, teacher, views, rates and centres."""
    if config.contrasts:
        return partial(contrastive_objective, config=config.contrastive)
    return partial(objective, losses=config.losses, targets=config.teacher)


def checkpoints_of(config: TrainConfig, folder: Path) -> Checkpoints:
    """The checkpoints of a run folder."""
    kept = config.checkpoint
    return Checkpoints(folder / "checkpoints", keep=kept.keep, keep_every=kept.keep_every)
