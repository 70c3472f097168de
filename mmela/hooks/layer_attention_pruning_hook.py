import copy
import json
import os.path as osp
from typing import Dict, List, Optional, Sequence, Union

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ..arguments import CheckedArguments, check_count
from ..engine import check_wrapper, prune_run, resumed_from, trained_parameters
from ..layers import LayerAttention
from ..pruning import PruningDecision, PruningPolicy, PruningReport, build_policy
from ..pruning.record import check_name, keep_earlier, within
from ..structure import AttentionStage, trained_stages, unreached
from .decision_log_hook import DecisionLogHook
from .measured_stages import candidate_stages, measured_stages
from .measurement import Measurement
from .meter import NetworkKLMeter, check_measurement
from .saved_pruning import SavedPruning
from .windows import Window, check_run, check_windows

CHECKPOINT_KEY = 'layer_attention_pruning'
UNPRUNED = 'before_pruning.pth'


@HOOKS.register_module()
class LayerAttentionPruningHook(Hook, metaclass=CheckedArguments):
    """Prune redundant layer attentions while a network trains (ELA).

    During each window of the training the hook measures the KL divergence between
    the attention weights of adjacent blocks (ELA, eq. 8). At the end of the window a
    policy decides from the means which attentions are redundant (ELA, algorithm 1),
    and the network skips these from then on. Two attentions are adjacent if no active
    attention of their stage lies between them.

    Checkpoints store which attentions are pruned, as part of the model, and the sums
    of a window in progress. ``pruning.json`` in the work directory holds all decisions
    with the numbers behind them.

    Args:
        windows (Sequence[tuple[int, int]]): First and last epoch of each
            measuring window, counted from 1, both inclusive. ELA: (1, 1) and
            (7, 7) of 12 for COCO, (1, 3) and (51, 53) of 100 for ImageNet,
            (1, 3), (45, 48) and (91, 93) of 180 for CIFAR. An empty list prunes
            nothing more.
        policy (dict | PruningPolicy): The pruning policy or its config, see
            :mod:`mmela.pruning`.
            Defaults to ``dict(type='EBQM')``.
        by_epoch (bool): Whether windows count epochs; otherwise iterations,
            for an ``IterBasedTrainLoop``. Defaults to True.
        keep_value (bool): Let later attentions still see the key and value of
            a pruned one ("skip the retrieval"). Defaults to False.
        reduction (str): ``'mean_kl'``: KL divergence per sample and head,
            averaged over samples, heads and iterations; or
            ``'mean_distribution'``: KL divergence between the mean
            distributions. Defaults to ``'mean_kl'``.
        eps (float): Probability given to the tokens that the earlier of two
            attentions lacks. Defaults to 1e-8.
        log_interval (int): Interval in iterations at which the divergences
            measured so far go to the visualizer during a window; this waits for
            the device. With 0 they are written only with the decision. Defaults
            to 50.
        put_off_until (int, optional): Last epoch or iteration to which a decision
            may be put off. While the attentions have not learned yet, see
            :func:`~mmela.pruning.has_learned`, the hook measures another window
            of the same length; at this limit it decides anyway. A window that
            would overlap the next one is dropped. Defaults to None: always
            decide at the end of the window, with a warning if needed.
        followers (dict[str, str], optional): Modules that copy the structure of
            others, such as ``dict(teacher='student')`` for a teacher that is the
            running mean of a student. The hook leaves other networks that are
            not trained alone. Defaults to None.
        keep_unpruned (bool): Save the network right before the first pruning,
            without the optimizer, as ``before_pruning.pth`` in the work
            directory. The report compares it with the final network. The
            checkpoint of that epoch does not show it, because it is saved after
            the pruning. Defaults to True.

    A :class:`DecisionLogHook`, which this hook registers, writes the logs, scalars
    and pictures.

    Attributes:
        history (list[PruningDecision]): The decisions of the run so far.
        attentions (dict[str, LayerAttention]): The measured attentions by name.
        open (Measurement | None): The window in progress.

    Raises:
        TypeError: If a window is not a pair of integers, or if an argument is
            unknown or has the wrong type.
        ValueError: Before the first iteration, if a window starts before 1, is
            reversed, overlaps another or ends after the training; if the policy or
            another argument is unknown or out of range; if the loop, the model or a
            follower does not fit; or if a checkpoint holds a window measured with
            other settings, a damaged record, or decisions that contradict its
            network. At the end of a window, if a KL divergence is NaN or infinite;
            nothing is pruned then.
    """

    # Before the hooks that log (BELOW_NORMAL) and save (VERY_LOW)
    priority = 'ABOVE_NORMAL'

    def __init__(
        self,
        windows: Sequence[Window],
        policy: Union[dict, PruningPolicy, None] = None,
        by_epoch: bool = True,
        keep_value: bool = False,
        reduction: str = 'mean_kl',
        eps: float = 1e-8,
        log_interval: int = 50,
        put_off_until: Optional[int] = None,
        followers: Optional[Dict[str, str]] = None,
        keep_unpruned: bool = True,
    ) -> None:
        self.windows = check_windows(windows)
        self.policy = build_policy(policy)
        check_measurement(reduction, eps)
        check_count('log_interval', log_interval, 0)
        self.by_epoch = by_epoch
        self.keep_value = keep_value
        self.reduction = reduction
        self.eps = eps
        self.log_interval = log_interval
        if put_off_until is not None and not any(
            window[1] < put_off_until for window in self.windows
        ):
            raise ValueError(
                f'put_off_until={put_off_until} is not greater than the end of a '
                f'window; the windows are {self.windows}'
            )
        self.put_off_until = put_off_until
        self.followers = dict(followers or {})
        self.keep_unpruned = keep_unpruned
        # In the form of pruning.json
        self.settings = dict(
            windows=self.windows,
            by_epoch=by_epoch,
            policy=self.policy.config,
            keep_value=keep_value,
            reduction=reduction,
            eps=eps,
            put_off_until=put_off_until,
        )
        try:
            json.dumps(self.settings)
        except TypeError as error:  # fail now rather than when a window ends
            raise ValueError(
                f'policy={self.settings["policy"]} cannot be written to pruning.json; '
                f'its attributes must be plain values ({error})'
            ) from error
        self.history: List[PruningDecision] = []
        self.attentions: Dict[str, LayerAttention] = {}
        self.open: Optional[Measurement] = None
        self._unreached: List[str] = []
        self._looked = False
        self._loaded: Optional[dict] = None  # state from a checkpoint

    def before_run(self, runner) -> None:
        """Check that it is the only pruning hook, and register a logging hook."""
        kinds = [type(hook) for hook in runner.hooks]
        if sum(issubclass(kind, LayerAttentionPruningHook) for kind in kinds) > 1:
            raise ValueError(
                'the run has more than one LayerAttentionPruningHook; they would '
                'overwrite each other in pruning.json and in checkpoints. Use one hook '
                'with all windows (your custom_hooks replace those of a _base_ config '
                'as a whole)'
            )
        if not any(issubclass(kind, DecisionLogHook) for kind in kinds):
            runner.register_hook(DecisionLogHook(self.log_interval))

    def before_train(self, runner) -> None:
        """Check that the hook fits the run, and continue a resumed window."""
        check_run(runner, self.windows, self.by_epoch, self.put_off_until)
        check_wrapper(runner.model)
        self._choose(runner)
        for attention in self.attentions.values():
            stage = attention.place.stage
            stage.set_size(stage.size)  # mark all attentions as not reached
        self._resume(runner)

    def _choose(self, runner) -> None:
        """Choose the stages to measure: those of networks that are trained now."""
        parameters = trained_parameters(runner)
        stages = measured_stages(
            runner.model, parameters, self.followers, runner.logger
        )
        known = stages or candidate_stages(runner.model, self.followers)
        self._stages: Dict[str, AttentionStage] = known
        self.attentions = {
            check_name(name): attention
            for stage in known.values()
            for name, attention in stage.named.items()
        }
        self._trained = bool(stages)

    def _is_trained(self, runner) -> bool:
        """Whether any measured stage is trained now."""
        if not self._trained:
            self._choose(runner)
        trained = trained_stages(runner.model, trained_parameters(runner))
        return any(name in trained for name in self._stages)

    def _resume(self, runner) -> None:
        """Restore the state of a checkpoint, if the run resumes from it."""
        loaded, self._loaded = self._loaded, None
        done = self._done(runner)
        saved: Optional[SavedPruning] = None
        if loaded is not None and runner.iter > 0:
            with within(f'{resumed_from(runner)}, {CHECKPOINT_KEY}'):
                saved = SavedPruning.read(loaded, self.settings)
                saved.check_network(runner.model)
                saved.restore_starts(self.attentions)
            self.history = saved.history
        if self.history:
            self._write_report(runner)
        elif is_main_process():
            keep_earlier(self._report_path(runner))
        if saved is not None and saved.window is not None:
            self._resume_window(runner, saved.window, done)
        missed = [w for w in self._undecided() if w[1] <= done]
        if missed and self.open is None:
            rest = '' if self.windows[-1][1] > done else ', and no window is left'
            runner.logger.warning(
                f'The run has done {done} {self._unit}s, so windows {missed} have '
                f'passed without a decision{rest}.'
            )

    def _resume_window(self, runner, saved: dict, done: int) -> None:
        """Continue a window during which the checkpoint was saved."""
        first, last = window = tuple(saved['window'])
        put_off = saved.get('put_off', 0)
        known = (first - put_off, last - put_off) in self.windows
        if not known or not first - 1 <= done <= last:
            return
        saved_at = saved.get('done', done)
        # Versions before 0.2 saved sums of the divergences, not of their parts.
        if saved_at != done or 'put_off' not in saved:
            runner.logger.warning(
                f'Dropped the sums of window {window} in the checkpoint: they cover '
                f'{saved_at} {self._unit}s and the run has done {done}, or an earlier '
                'version of mmela saved them.'
            )
            return
        self._open_window(window, put_off).load_state_dict(saved)
        runner.logger.info(f'Continuing to measure window {window}')
        if done == window[1]:  # saved at its end, before the decision
            self._close_window(runner, runner.iter)

    # -- collect -----------------------------------------------------------

    @property
    def _unit(self) -> str:
        return 'epoch' if self.by_epoch else 'iteration'

    def _done(self, runner) -> int:
        """Number of completed epochs or iterations."""
        return runner.epoch if self.by_epoch else runner.iter

    def _undecided(self) -> List[Window]:
        decided = [decision.planned for decision in self.history]
        return [window for window in self.windows if window not in decided]

    def _open_window(self, window: Window, put_off: int = 0) -> Measurement:
        meter = NetworkKLMeter(self._stages, self.reduction, self.eps)
        self.open = Measurement(window, meter, put_off)
        return self.open

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Open a window that starts here, and measure the iteration if one is open."""
        # At the first iteration of an epoch, all hooks have frozen or unfrozen
        # their modules.
        if not self.by_epoch or batch_idx == 0:
            self._begin(runner)
        if self.open is not None:
            self.open.start()

    def _begin(self, runner) -> None:
        """Begin an epoch or iteration."""
        done = self._done(runner)
        if self.open is None:
            for window in self._undecided():
                if window[0] <= done + 1 <= window[1]:
                    # Another hook may freeze the network for some epochs.
                    if not self._is_trained(runner):
                        runner.logger.warning(
                            f'Window {window} does not open while the network is '
                            'frozen, because its attentions do not learn.'
                        )
                        break
                    self._open_window(window)
                    if done + 1 > window[0]:
                        runner.logger.warning(
                            f'Window {window} is measured only from {self._unit} '
                            f'{done + 1} on, because the checkpoint does not hold the '
                            'sums before.'
                        )
        if self.open is not None:
            self.open.begin(done)

    # -- reduce, decide, broadcast, apply ----------------------------------

    def after_train_iter(
        self, runner, batch_idx, data_batch=None, outputs=None
    ) -> None:
        """Reduce the sums, and close a window that ends here."""
        if not self._looked:
            self._name_unreached(runner)
        if self.open is None:
            return
        self.open.stop()
        iteration = runner.iter + 1
        if not self.by_epoch and iteration == self.open.window[1]:
            self._close_window(runner, iteration)

    def after_train_epoch(self, runner) -> None:
        """Close a window that ends with this epoch."""
        self._name_unreached(runner)
        if self.by_epoch and self.open and runner.epoch + 1 == self.open.window[1]:
            self._close_window(runner, runner.iter)

    def _close_window(self, runner, iteration: int) -> None:
        """Decide on rank 0 and broadcast: other ranks may round differently."""
        measured, self.open = self.open, None
        message = [None]
        if is_main_process():
            for stage in measured.meter.silent_stages():
                runner.logger.warning(
                    f'{stage} did not run during window {measured.window}, so its '
                    'layer attentions are not measured and stay active.'
                )
            where = dict(
                window=measured.window,
                unit=self._unit,
                iteration=iteration,
                put_off=measured.put_off,
                seed=[runner.seed or 0, iteration],
            )
            try:
                message = [measured.meter.decide(self.policy, self.keep_value, **where)]
            except ValueError as error:
                message = [str(error)]
        broadcast_object_list(message)
        decision = message[0]
        if isinstance(decision, str):
            raise ValueError(decision)
        if decision.warning and self._put_off(runner, decision):
            return
        if self.keep_unpruned and decision.pruned and not self._has_pruned():
            runner.save_checkpoint(
                runner.work_dir,
                UNPRUNED,
                save_optimizer=False,
                save_param_scheduler=False,
                by_epoch=self.by_epoch,
            )
        prune_run(runner, decision.pruned, self.keep_value, self.followers)
        self.history.append(decision)
        self._write_report(runner)

    @property
    def unpruned(self) -> Optional[str]:
        """str | None: Name of the checkpoint from before the first pruning, in the work
        directory; None while nothing is pruned, and with ``keep_unpruned=False``."""
        return UNPRUNED if self.keep_unpruned and self._has_pruned() else None

    def _has_pruned(self) -> bool:
        return any(decision.pruned for decision in self.history)

    def _put_off(self, runner, decision: PruningDecision) -> bool:
        """Put a decision off if that is allowed; return whether it was."""
        first, last = decision.window
        length = last - first + 1
        if self.put_off_until is None or last + length > self.put_off_until:
            return False
        overlapped = [w for w in self.windows if first < w[0] <= last + length]
        if overlapped:
            change = f'dropped in favour of window {overlapped[0]}'
        else:
            later = (first + length, last + length)
            change = f'put off to {later}'
            self._open_window(later, decision.put_off + length)
        runner.logger.info(f'Window {decision.window} is {change}. {decision.warning}.')
        return True

    # -- report ------------------------------------------------------------

    def _name_unreached(self, runner) -> None:
        """Warn about attentions that never ran, if the list has changed."""
        missed = [name for name in unreached(runner.model) if name in self.attentions]
        known, self._unreached, self._looked = self._unreached, missed, True
        if missed and missed != known:
            runner.logger.warning(
                'These layer attentions have not run in training, so they are neither '
                f'trained nor measured: {", ".join(missed)}. Their blocks do not run, '
                'or the network calls them without forward(). Leave them out with '
                'blocks=[...].'
            )

    def _report_path(self, runner) -> str:
        return osp.join(runner.work_dir, 'pruning.json')

    def _write_report(self, runner) -> None:
        if is_main_process():
            report = PruningReport(self.settings, tuple(self.history))
            report.write(self._report_path(runner))

    # -- checkpoints -------------------------------------------------------

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Save the decisions so far and the sums of a window in progress."""
        done = checkpoint['meta']['epoch' if self.by_epoch else 'iter']
        checkpoint[CHECKPOINT_KEY] = dict(
            history=[decision.to_dict() for decision in self.history],
            random_start={
                name: attention.random_start
                for name, attention in self.attentions.items()
            },
            window=self.open and self.open.state_dict(done),
        )

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Keep the state of :meth:`before_save_checkpoint` for a resume."""
        self._loaded = copy.deepcopy(checkpoint.get(CHECKPOINT_KEY))
