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

    In given windows of the training the hook measures the KL divergence
    between the attention weights of adjacent blocks (ELA, eq. 8). At the end
    of each window a policy decides from the means which attentions are
    redundant (ELA, algorithm 1), and they are skipped from then on. Adjacency
    is between consecutive attentions that are still active.

    Which attentions are pruned travels in the checkpoint as part of the model;
    so do the sums of a window in progress. ``pruning.json`` in the work
    directory holds all decisions with the numbers behind them.

    Args:
        windows (Sequence[tuple[int, int]]): First and last epoch of each
            measuring window, counted from 1, both inclusive. ELA: (1, 1) and
            (7, 7) of 12 for COCO, (1, 3) and (51, 53) of 100 for ImageNet,
            (1, 3), (45, 48) and (91, 93) of 180 for CIFAR. None at all prunes
            no more.
        policy (dict | PruningPolicy): Config of the pruning policy, see
            :mod:`mmela.pruning`, or the policy.
            Defaults to ``dict(type='EBQM')``.
        by_epoch (bool): Whether windows count epochs; otherwise iterations,
            for an ``IterBasedTrainLoop``. Defaults to True.
        keep_value (bool): Let later attentions still see the key and value of
            a pruned one ("skip the retrieval"). Defaults to False.
        reduction (str): ``'mean_kl'``: KL divergence per sample and head, then
            the mean over samples, heads and iterations; or
            ``'mean_distribution'``: KL divergence between the means of the
            distributions. Defaults to ``'mean_kl'``.
        eps (float): Probability given to the tokens that the earlier of two
            attentions lacks. Defaults to 1e-8.
        log_interval (int): Write the divergences measured so far to the
            visualizer each so many iterations of a window, which waits for
            the device. 0 writes them with the decision alone. Defaults to 50.
        put_off_until (int, optional): Put a decision off while the attentions
            have not learned yet, see :func:`~mmela.pruning.has_learned`: a
            window is then measured once more, by as many epochs or iterations,
            until they have, up to this one, where it is decided all the same.
            A window that runs into the next is given up for it. Defaults to
            None, which decides in any case, with a warning.
        followers (dict[str, str], optional): Modules of the model that get
            the structure of others, such as ``dict(teacher='student')`` where
            a teacher is the running mean of a student. Networks that are not
            trained are else left alone. Defaults to None.
        keep_unpruned (bool): Save the network as it is right before the first
            pruning, without the optimizer, as ``before_pruning.pth`` in the
            work directory. The report compares the final network with it, and
            no other checkpoint need be from before: that of the epoch is saved
            after the pruning. Defaults to True.

    What is logged, in tables, scalars and pictures, is up to a
    :class:`DecisionLogHook`, which a run gets with this one.

    Attributes:
        history (list[PruningDecision]): The decisions of the run so far.
        attentions (dict[str, LayerAttention]): What is measured, by name.
        open (Measurement | None): The window in progress.

    Raises:
        TypeError: If a window is not a pair of integers, or an argument is unknown
            or of another type.
        ValueError: If a window starts before 1, is reversed, overlaps another
            or ends after the training; if the policy or another argument is
            unknown or out of range; if the loop, the model or a follower does
            not fit; or if a checkpoint holds a window that was measured
            otherwise, a damaged record, or decisions that contradict its network.
            All of these come before the first iteration. Also if a
            measured KL divergence is NaN or infinite; nothing is pruned then.
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
                f'put_off_until={put_off_until} is not above the end of a window; the '
                f'windows are {self.windows}'
            )
        self.put_off_until = put_off_until
        self.followers = dict(followers or {})
        self.keep_unpruned = keep_unpruned
        # As pruning.json has them
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
        except TypeError as error:  # better now than when a window ends
            raise ValueError(
                f'policy={self.settings["policy"]} cannot be written to pruning.json: '
                f'its attributes must be plain values ({error})'
            ) from error
        self.history: List[PruningDecision] = []
        self.attentions: Dict[str, LayerAttention] = {}
        self.open: Optional[Measurement] = None
        self._unreached: List[str] = []
        self._looked = False
        self._loaded: Optional[dict] = None  # of a checkpoint

    def before_run(self, runner) -> None:
        """Check that it is the only one, and have its decisions logged."""
        kinds = [type(hook) for hook in runner.hooks]
        if sum(issubclass(kind, LayerAttentionPruningHook) for kind in kinds) > 1:
            raise ValueError(
                'the run has two LayerAttentionPruningHooks, of which the second would '
                'overwrite pruning.json and the decisions in the checkpoints of the '
                'first; give one, with all windows (custom_hooks of a _base_ config '
                'are replaced as a whole: list one there or in yours)'
            )
        if not any(issubclass(kind, DecisionLogHook) for kind in kinds):
            runner.register_hook(DecisionLogHook(self.log_interval))

    def before_train(self, runner) -> None:
        """Check that the hook fits the run, and take up a resumed window."""
        check_run(runner, self.windows, self.by_epoch, self.put_off_until)
        check_wrapper(runner.model)
        self._choose(runner)
        for attention in self.attentions.values():
            stage = attention.place.stage
            stage.set_size(stage.size)  # none is reached yet
        self._resume(runner)

    def _choose(self, runner) -> None:
        """Choose what is measured: networks that are trained at this moment."""
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
        """Whether something of what is measured is trained at this moment."""
        if not self._trained:
            self._choose(runner)
        trained = trained_stages(runner.model, trained_parameters(runner))
        return any(name in trained for name in self._stages)

    def _resume(self, runner) -> None:
        """Take up what a checkpoint held, if the run goes on from it."""
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
                f'Windows {missed} are past without a decision, as the run stands '
                f'after {self._unit} {done}{rest}.'
            )

    def _resume_window(self, runner, saved: dict, done: int) -> None:
        """Go on with a window that a checkpoint was saved in."""
        first, last = window = tuple(saved['window'])
        put_off = saved.get('put_off', 0)
        known = (first - put_off, last - put_off) in self.windows
        if not known or not first - 1 <= done <= last:
            return
        stands = saved.get('done', done)
        # Before 0.2 there were sums of the divergences, not of their parts.
        if stands != done or 'put_off' not in saved:
            runner.logger.warning(
                f'The sums of window {window} in the checkpoint stand after '
                f'{self._unit} {stands} and the run after {done}, or are of an '
                'earlier version: they are dropped.'
            )
            return
        self._open_window(window, put_off).load_state_dict(saved)
        runner.logger.info(f'Continue to measure window {window}')
        if done == window[1]:  # saved at its end, but before the decision
            self._close_window(runner, runner.iter)

    # -- collect -----------------------------------------------------------

    @property
    def _unit(self) -> str:
        return 'epoch' if self.by_epoch else 'iteration'

    def _done(self, runner) -> int:
        """Epochs or iterations done, without the one in progress."""
        return runner.epoch if self.by_epoch else runner.iter

    def _undecided(self) -> List[Window]:
        decided = [decision.planned for decision in self.history]
        return [window for window in self.windows if window not in decided]

    def _open_window(self, window: Window, put_off: int = 0) -> Measurement:
        meter = NetworkKLMeter(self._stages, self.reduction, self.eps)
        self.open = Measurement(window, meter, put_off)
        return self.open

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Measure the coming iteration if a window is open, or opens with it."""
        # At the first iteration of an epoch, when all hooks have frozen or
        # unfrozen what they will
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
                            f'Window {window} does not begin while the network is '
                            'frozen: attentions that do not learn say nothing.'
                        )
                        break
                    self._open_window(window)
                    if done + 1 > window[0]:
                        runner.logger.warning(
                            f'Window {window} is measured from {done + 1} on: '
                            'the checkpoint does not hold its beginning.'
                        )
        if self.open is not None:
            self.open.begin(done)

    # -- reduce, decide, broadcast, apply ----------------------------------

    def after_train_iter(
        self, runner, batch_idx, data_batch=None, outputs=None
    ) -> None:
        """Reduce what was measured; close a window that ends here."""
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
        """Decide, on rank 0 alone: floating point may differ elsewhere."""
        measured, self.open = self.open, None
        message = [None]
        if is_main_process():
            for stage in measured.meter.silent_stages():
                runner.logger.warning(
                    f'{stage} has not run in window {measured.window}: its layer '
                    'attentions are not measured, and kept.'
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
        """Measure a window once more, if it may be put off."""
        first, last = decision.window
        length = last - first + 1
        if self.put_off_until is None or last + length > self.put_off_until:
            return False
        why = f'{decision.warning}: window {decision.window} '
        taken = [w for w in self.windows if first < w[0] <= last + length]
        if taken:
            runner.logger.info(why + f'is given up for window {taken[0]}.')
        else:
            again = (first + length, last + length)
            runner.logger.info(why + f'is put off to {again}.')
            self._open_window(again, decision.put_off + length)
        return True

    # -- report ------------------------------------------------------------

    def _name_unreached(self, runner) -> None:
        """Say which attentions no pass has come to, if there are others than before."""
        missed = [name for name in unreached(runner.model) if name in self.attentions]
        known, self._unreached, self._looked = self._unreached, missed, True
        if missed and missed != known:
            runner.logger.warning(
                'No training pass has reached these layer attentions, so they are '
                f'neither trained nor measured: {", ".join(missed)}. Their blocks do '
                'not run, or the network calls another method of them than forward().'
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
        """Keep what :meth:`before_save_checkpoint` saved, for a resume."""
        self._loaded = copy.deepcopy(checkpoint.get(CHECKPOINT_KEY))
