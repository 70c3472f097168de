import copy
import gc
import io
import json
import os
import os.path as osp
import time
from statistics import median
from typing import List, Optional, Sequence, Tuple, Union

import torch
from mmengine.dist import all_reduce, broadcast_object_list, is_main_process
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import FlexibleRunner, IterBasedTrainLoop
from rich import box
from rich.console import Console
from rich.table import Table
from torch.nn.parallel import DistributedDataParallel

from ..pruning import PRUNING_POLICIES
from ..structure import attention_stages, layer_attentions, prune
from .decide import decide
from .kl_meter import REDUCTIONS, NetworkKLMeter

CHECKPOINT_KEY = 'layer_attention_pruning'


@HOOKS.register_module()
class LayerAttentionPruningHook(Hook):
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
            no more, which is what fine-tuning a pruned checkpoint on several
            GPUs needs: the hook then only keeps distributed training from
            waiting for pruned parameters.
        policy (dict): Config of the pruning policy, see :mod:`mmela.pruning`.
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
            the device. On several GPUs they are those of the first one since
            the last epoch or checkpoint on; the decision is on all. 0 writes
            them with the decision alone. Defaults to 50.

    The visualizer gets ``layer_attention/active`` when the training starts and
    after each decision, ``layer_attention/kl/NAME`` during a window and with
    the decision, ``normalized``, ``mapped`` and ``pruned`` with the decision,
    and ``layer_attention/step_time``, the median in seconds since the decision
    before or the start, with each decision and at the end.

    Raises:
        TypeError: If a window is not a pair of integers.
        ValueError: If a window starts before 1, is reversed, overlaps another
            or ends after the training; if an argument of the policy is out of
            range; or if the loop or the model does not fit. All of these come
            before the first iteration. Also if a measured KL divergence is NaN
            or infinite; nothing is pruned then.
    """

    # Before the hooks that log (BELOW_NORMAL) and save (VERY_LOW)
    priority = 'ABOVE_NORMAL'

    def __init__(
        self,
        windows: Sequence[Tuple[int, int]],
        policy: Union[dict, None] = None,
        by_epoch: bool = True,
        keep_value: bool = False,
        reduction: str = 'mean_kl',
        eps: float = 1e-8,
        log_interval: int = 50,
    ) -> None:
        self.windows = _check_windows(windows)
        self.policy_cfg = dict(policy or dict(type='EBQM'))
        # The scope keeps mmengine from looking, in vain and with a warning,
        # among the toolbox's own.
        self.policy = PRUNING_POLICIES.build(dict(self.policy_cfg, _scope_='mmela'))
        if reduction not in REDUCTIONS:
            raise ValueError(
                f'reduction={reduction!r} is unknown; allowed '
                f'are {", ".join(map(repr, REDUCTIONS))}'
            )
        if not 0 < eps < 1:
            raise ValueError(f'eps={eps} is not in (0, 1)')
        if type(log_interval) is not int or log_interval < 0:
            raise ValueError(f'log_interval={log_interval!r} is not an integer >= 0')
        self.by_epoch = by_epoch
        self.keep_value = keep_value
        self.reduction = reduction
        self.eps = eps
        self.log_interval = log_interval
        self.history: List[dict] = []
        # Active attentions and median step time between the decisions
        self._speeds: List[Tuple[int, Optional[float], int]] = []
        self._timed = 0
        self._meter: Optional[NetworkKLMeter] = None
        self._window: Optional[Tuple[int, int]] = None
        # Sums of the window at the last point from which a run may resume
        self._snapshot: Optional[dict] = None
        self._resumed: Optional[dict] = None

    # -- before training ---------------------------------------------------

    def before_train(self, runner) -> None:
        """Check that the hook fits the run, and continue a resumed window."""
        iter_based = isinstance(runner.train_loop, IterBasedTrainLoop)
        unit = 'epochs' if self.by_epoch else 'iterations'
        if self.by_epoch and iter_based:
            raise ValueError(
                'LayerAttentionPruningHook counts epochs, but the run has an '
                'IterBasedTrainLoop; give the windows in iterations and set '
                'by_epoch=False'
            )
        if not self.by_epoch and not iter_based:
            raise ValueError(
                'LayerAttentionPruningHook has by_epoch=False, which needs an '
                f'IterBasedTrainLoop, not {type(runner.train_loop).__name__}; '
                'give the windows in epochs and set by_epoch=True'
            )
        end = runner.max_epochs if self.by_epoch else runner.max_iters
        for window in self.windows[-1:]:
            if window[1] > end:
                raise ValueError(f'window {window} ends after the last of {end} {unit}')
            if window[1] == end:
                runner.logger.warning(
                    f'Window {window} ends with the training: what it prunes '
                    'is never trained without.'
                )

        if is_model_wrapper(runner.model) and not isinstance(
            runner.model, DistributedDataParallel
        ):
            raise ValueError(
                'LayerAttentionPruningHook cannot prune in a '
                f'{type(runner.model).__name__}, which shares out or flattens '
                'the parameters before they are pruned; train with '
                'MMDistributedDataParallel instead'
            )

        self._stages = attention_stages(runner.model)
        self._attentions = layer_attentions(runner.model)
        types = sorted({type(a).__name__ for a in self._attentions.values()})
        if not any(a.prunable for a in self._attentions.values()):
            found = ', '.join(types) if types else 'none'
            raise ValueError(
                'LayerAttentionPruningHook needs a backbone with a prunable '
                'layer attention, one that weighs layers by a distribution '
                f'such as MRLABase; found: {found}. Use e.g. '
                "backbone=dict(type='ELAResNet', "
                "layer_attention=dict(type='MRLABase'))"
            )

        if self.history:
            self._write_report(runner)
        else:
            self._backup_report(runner)
        self._log_structure(runner)
        # A resumed run brings the step times of the run before with it.
        self._timed = len(self._step_times(runner))
        self._speeds = []
        if not all(a.active for a in self._attentions.values()):
            # The wrapper was made before the checkpoint was loaded.
            self._rewrap(runner)
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            self._resume_window(runner, resumed)

    def _resume_window(self, runner, resumed: dict) -> None:
        """Continue a window that a checkpoint was saved in."""
        done = runner.epoch if self.by_epoch else runner.iter
        window = tuple(resumed['window'])
        if window not in self.windows or not window[0] <= done < window[1]:
            return
        self._open_window(window)
        self._meter.load_state_dict(resumed['sums'])
        self._snapshot = resumed
        if not is_main_process():
            self._meter.reset()
        runner.logger.info(f'Continue to measure window {window}')

    # -- measuring ---------------------------------------------------------

    def _position(self, runner) -> int:
        """Current epoch or iteration, counted from 1."""
        return (runner.epoch if self.by_epoch else runner.iter) + 1

    def _open_window(self, window: Tuple[int, int]) -> None:
        self._window = window
        self._meter = NetworkKLMeter(self._stages, self.reduction, self.eps)

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Measure the coming iteration if a window is open."""
        position = self._position(runner)
        if self._window is None:
            for window in self.windows:
                if window[0] <= position <= window[1]:
                    if position > window[0]:
                        runner.logger.warning(
                            f'Window {window} is measured from {position} on: '
                            'the checkpoint does not hold its beginning.'
                        )
                    self._open_window(window)
        if self._window is not None:
            self._meter.attach()

    def after_train_iter(
        self, runner, batch_idx, data_batch=None, outputs=None
    ) -> None:
        """Close a window that ends with this iteration."""
        if self._window is None:
            return
        self._meter.detach()
        if (
            self.log_interval
            and is_main_process()
            and (runner.iter + 1) % self.log_interval == 0
        ):
            self._log_divergences(runner)
        if self.by_epoch:
            return
        if self._position(runner) == self._window[1]:
            self._close_window(runner)
        elif any(
            isinstance(hook, CheckpointHook)
            and not hook.by_epoch
            and hook.every_n_train_iters(runner, hook.interval, hook.save_begin)
            for hook in runner.hooks
        ):
            self._reduce()

    def after_train_epoch(self, runner) -> None:
        """Close a window that ends with this epoch."""
        if self._window is None or not self.by_epoch:
            return
        if self._position(runner) == self._window[1]:
            self._close_window(runner)
        else:
            self._reduce()

    def before_val_epoch(self, runner) -> None:
        """Make the sums complete for a checkpoint saved by validation."""
        if self._window is not None and not self.by_epoch:
            self._reduce()

    def _reduce(self) -> None:
        """Move the sums of all ranks to rank 0, which saves checkpoints."""
        for meter in self._meter.meters.values():
            all_reduce(meter.sums)
        self._snapshot = dict(window=list(self._window), sums=self._meter.state_dict())
        if not is_main_process():
            self._meter.reset()

    # -- deciding ----------------------------------------------------------

    def _close_window(self, runner) -> None:
        self._reduce()
        # Decided once: floating point may differ between machines.
        message = [None]
        if is_main_process():
            try:
                message = [self._decide(runner)]
            except ValueError as error:
                message = [str(error)]
        broadcast_object_list(message)
        self._meter = self._window = self._snapshot = None
        if isinstance(message[0], str):
            raise ValueError(message[0])
        record = message[0]
        self._apply(runner, record['pruned'])
        self.history.append(record)
        self._log(runner, record)
        self._write_report(runner)

    def _decide(self, runner) -> dict:
        """Have the policy decide on the sums, which rank 0 has."""
        layers = decide(self._stages, self._meter.compute(), self.policy)
        return dict(
            window=list(self._window),
            unit='epoch' if self.by_epoch else 'iteration',
            iteration=self._iterations(runner),
            layers=layers,
            pruned=[layer['name'] for layer in layers if layer['skip']],
            active=[layer['name'] for layer in layers if not layer['skip']],
        )

    def _iterations(self, runner) -> int:
        """Iterations done. The counter moves on only after the hooks."""
        return runner.iter if self.by_epoch else runner.iter + 1

    def _apply(self, runner, pruned: Sequence[str]) -> None:
        """Prune attentions wherever the run holds a copy of them."""
        models = [runner.model]
        models += [
            hook.ema_model.module
            for hook in runner.hooks
            if isinstance(hook, EMAHook) and hasattr(hook, 'ema_model')
        ]
        for model in models:
            prune(model, pruned, self.keep_value)
        if pruned:
            self._forget_optimizer_state(runner)
            self._rewrap(runner)

    def _forget_optimizer_state(self, runner) -> None:
        """Drop momenta of what is no longer trained.

        The parameters stay in their groups, so that the state dict of the
        optimizer fits a network that is not pruned yet; without a gradient
        they are neither updated nor decayed.
        """
        wrappers = runner.optim_wrapper
        wrappers = (
            wrappers.values() if isinstance(wrappers, OptimWrapperDict) else [wrappers]
        )
        for wrapper in wrappers:
            for param in list(wrapper.optimizer.state):
                if isinstance(param, torch.Tensor) and not param.requires_grad:
                    del wrapper.optimizer.state[param]

    def _rewrap(self, runner) -> None:
        """Have distributed training no longer wait for pruned gradients."""
        if not isinstance(runner.model, DistributedDataParallel):
            return
        module = runner.model.module
        # The old reducer must go first, or both would reduce. A compiled
        # train_step refers to the wrapper that it belongs to.
        vars(runner.model).pop('train_step', None)
        runner.model = None
        if isinstance(runner, FlexibleRunner):
            runner.strategy.model = None
            gc.collect()
            runner.model = runner.strategy._wrap_model(module)
            runner.strategy.model = runner.model
        else:
            gc.collect()
            runner.model = runner.wrap_model(
                runner.cfg.get('model_wrapper_cfg'), module
            )
            runner._maybe_compile('train_step')

    # -- reporting ---------------------------------------------------------

    def _log_structure(self, runner) -> None:
        active = sum(a.active for a in self._attentions.values())
        runner.visualizer.add_scalars(
            {'layer_attention/active': active}, step=runner.iter
        )
        runner.logger.info(
            f'Layer attentions: {active} of {len(self._attentions)} active in '
            f'{len(self._stages)} stages'
        )

    def _log(self, runner, record: dict) -> None:
        before = len(record['layers'])
        after = len(record['active'])
        self._log_speed(runner, before, record['iteration'])
        window = '-'.join(map(str, sorted(set(record['window']))))
        runner.logger.info(
            f'Layer attention pruning after {record["unit"]} {window}: '
            f'{before} -> {after} active attentions, {self.policy}\n'
            + format_decisions(record['layers'])
        )
        scalars = {'layer_attention/active': after}
        for layer in record['layers']:
            name = layer['name']
            for key in ('kl', 'normalized', 'mapped'):
                if layer[key] is not None:
                    scalars[f'layer_attention/{key}/{name}'] = layer[key]
            scalars[f'layer_attention/pruned/{name}'] = int(layer['skip'])
        runner.visualizer.add_scalars(scalars, step=record['iteration'])

    def _log_divergences(self, runner) -> None:
        """Write what the open window has measured so far."""
        scalars = {}
        for stage, values in self._meter.compute().items():
            names = [
                f'{stage}.{n}'
                for n, a in self._stages[stage].named_attentions().items()
                if a.active
            ]
            scalars.update(
                {
                    f'layer_attention/kl/{name}': value
                    for name, value in zip(names, values)
                    if value is not None
                }
            )
        runner.visualizer.add_scalars(scalars, step=runner.iter + 1)

    @staticmethod
    def _step_times(runner) -> Sequence[float]:
        """Logged times of all training steps, in seconds."""
        if 'train/time' not in runner.message_hub.log_scalars:
            return []
        return runner.message_hub.get_scalar('train/time').data[0]

    def _log_speed(self, runner, active: int, step: int) -> None:
        """Write the step time since the last decision.

        Args:
            runner (Runner): The runner.
            active (int): Active attentions in that time.
            step (int): Iterations done.
        """
        times = list(self._step_times(runner))[self._timed :]
        self._timed += len(times)
        if not times:
            return
        seconds = float(median(times))
        self._speeds.append((active, seconds, len(times)))
        runner.visualizer.add_scalars({'layer_attention/step_time': seconds}, step=step)

    def after_train(self, runner) -> None:
        """Compare the step times between the decisions."""
        self._log_speed(
            runner, sum(a.active for a in self._attentions.values()), runner.iter
        )
        if len(self._speeds) > 1:
            runner.logger.info('Training speed:\n' + format_speeds(self._speeds))

    def _report_path(self, runner) -> str:
        return osp.join(runner.work_dir, 'pruning.json')

    def _backup_report(self, runner) -> None:
        """Keep the report of an earlier run in the same work directory."""
        path = self._report_path(runner)
        if not is_main_process() or not osp.exists(path):
            return
        stamp = time.strftime('%Y%m%d_%H%M%S', time.localtime(osp.getmtime(path)))
        os.replace(path, osp.join(runner.work_dir, f'pruning_{stamp}.json'))

    def _write_report(self, runner) -> None:
        if not is_main_process():
            return
        report = dict(
            hook=dict(
                windows=[list(window) for window in self.windows],
                by_epoch=self.by_epoch,
                policy=self.policy_cfg,
                keep_value=self.keep_value,
                reduction=self.reduction,
                eps=self.eps,
            ),
            prunings=self.history,
        )
        path = self._report_path(runner)
        with open(path + '.tmp', 'w') as file:
            json.dump(report, file, indent=2)
        os.replace(path + '.tmp', path)

    # -- checkpoints -------------------------------------------------------

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Save the decisions so far and the sums of a window in progress."""
        checkpoint[CHECKPOINT_KEY] = dict(
            history=copy.deepcopy(self.history), window=self._snapshot
        )

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Take up what :meth:`before_save_checkpoint` saved, on a resume."""
        if runner._resume and CHECKPOINT_KEY in checkpoint:
            saved = checkpoint[CHECKPOINT_KEY]
            self.history = copy.deepcopy(saved['history'])
            self._resumed = saved['window']


def _check_windows(windows: Sequence[Tuple[int, int]]) -> List[Tuple[int, int]]:
    """Sort the windows and check that they are sound and disjoint."""
    checked = []
    for window in windows:
        if (
            not isinstance(window, (tuple, list))
            or len(window) != 2
            or not all(type(bound) is int for bound in window)
        ):
            raise TypeError(f'window {window} is not a pair of integers (first, last)')
        first, last = window
        if first < 1:
            raise ValueError(
                f'window {(first, last)} starts before 1; epochs '
                'and iterations are counted from 1'
            )
        if last < first:
            raise ValueError(
                f'window {(first, last)} is reversed: it ends before it starts'
            )
        checked.append((first, last))
    checked.sort()
    for earlier, later in zip(checked, checked[1:]):
        if later[0] <= earlier[1]:
            raise ValueError(f'windows {earlier} and {later} overlap')
    return checked


def format_speeds(speeds: Sequence[Tuple[int, float, int]]) -> str:
    """Format step times as a table for a terminal.

    Args:
        speeds (Sequence[tuple[int, float, int]]): Active attentions, median
            step time in seconds and number of steps, in order.

    Returns:
        str: A table of 100 columns at most.
    """
    table = Table(box=box.MARKDOWN)
    for column in ('active attentions', 'median step time (s)', 'change', 'steps'):
        table.add_column(column, justify='right')
    for active, seconds, count in speeds:
        change = 100 * (seconds / speeds[0][1] - 1) if speeds[0][1] else 0
        table.add_row(str(active), f'{seconds:.4g}', f'{change:+.1f} %', str(count))
    return _render(table)


def format_decisions(layers: Sequence[dict]) -> str:
    """Format a decision as a table for a terminal.

    Args:
        layers (Sequence[dict]): The ``layers`` of an entry of ``prunings`` in
            ``pruning.json``.

    Returns:
        str: A table of 100 columns at most.
    """
    table = Table(box=box.MARKDOWN)
    table.add_column('layer attention', no_wrap=True)
    for column in ('KL', 'normalised', 'mapped'):
        table.add_column(column, justify='right')
    table.add_column('decision')
    for layer in layers:
        numbers = [
            '' if layer[key] is None else f'{layer[key]:.4g}'
            for key in ('kl', 'normalized', 'mapped')
        ]
        name = layer['name']
        if name.endswith('.layer_attn'):
            name = name[: -len('.layer_attn')]
        table.add_row(name, *numbers, layer['reason'])
    return _render(table)


def _render(table: Table) -> str:
    buffer = io.StringIO()
    Console(file=buffer, width=100).print(table)
    lines = (line.rstrip() for line in buffer.getvalue().splitlines())
    return '\n'.join(line for line in lines if line)
