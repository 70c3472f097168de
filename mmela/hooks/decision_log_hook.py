import os.path as osp
from typing import Any, Optional

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.visualization import LocalVisBackend

from ..arguments import CheckedArguments, check_count
from ..engine import StepTimes
from ..engine.tables import decision_table
from ..pruning import PruningDecision


@HOOKS.register_module()
class DecisionLogHook(Hook, metaclass=CheckedArguments):
    """Log what a :class:`LayerAttentionPruningHook` measures and decides.

    A run with that hook registers this one automatically.

    The visualizer gets ``layer_attention/active`` when the training starts and
    after each decision; ``layer_attention/kl/NAME`` during a window and with the
    decision; ``normalized``, ``mapped`` and ``pruned`` with the decision; and
    ``layer_attention/step_time``, the median in seconds since the previous decision
    or the start, with each decision and at the end. Experiment trackers (backends
    other than ``LocalVisBackend``) also get two pictures of each decision, the
    divergences and the table.

    Args:
        interval (int): Interval in iterations at which the divergences measured so
            far are written during a window; writing waits for the device. With 0
            they are written only with the decision. Defaults to 50.
    """

    # After the hook that prunes (ABOVE_NORMAL), before those that log and save
    priority = 'NORMAL'

    def __init__(self, interval: int = 50) -> None:
        self.interval = check_count('interval', interval, 0)
        self._pruning: Any = None
        self._told = 0

    def before_train(self, runner) -> None:
        """Log how many attentions are active."""
        self._pruning = _pruning_hook(runner)
        if self._pruning is None:
            raise ValueError(
                'DecisionLogHook needs a LayerAttentionPruningHook in the same run'
            )
        self._told = len(self._pruning.history)
        active, attentions = self._count_active(), self._pruning.attentions
        runner.visualizer.add_scalars(
            {'layer_attention/active': active}, step=runner.iter
        )
        stages = {id(attention.place.stage) for attention in attentions.values()}
        runner.logger.info(
            f'Layer attention: {active} of {len(attentions)} attentions active in '
            f'{len(stages)} stages'
        )
        self._step_times = StepTimes(runner)

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Log that a window has started."""
        self._log_begin(runner)

    def after_train_iter(
        self, runner, batch_idx, data_batch=None, outputs=None
    ) -> None:
        """Log the divergences of an open window, or a new decision."""
        iteration = runner.iter + 1
        measured = self._pruning.open
        due = self.interval and iteration % self.interval == 0
        if measured is not None and due and is_main_process():
            scalars = {
                f'layer_attention/kl/{name}': value.total
                for name, value in measured.meter.compute().items()
                if value is not None
            }
            runner.visualizer.add_scalars(scalars, step=iteration)
        self._log_new(runner)

    def after_train_epoch(self, runner) -> None:
        """Log a decision made at the end of the epoch."""
        self._log_new(runner)

    def after_train(self, runner) -> None:
        """Log the step times between decisions and the next commands."""
        self._step_times.record(runner, self._count_active(), runner.iter)
        if self._step_times.table():
            runner.logger.info('Training speed:\n' + self._step_times.table())
        if self._pruning.history:
            runner.logger.info(self._next_commands(runner))

    def _count_active(self) -> int:
        return sum(a.active for a in self._pruning.attentions.values())

    def _files(self, runner) -> str:
        """List the files of the decisions."""
        text = f'All numbers of this decision: {runner.work_dir}/pruning.json.'
        if self._pruning.unpruned is not None:
            name = self._pruning.unpruned
            text += f' The network before the first pruning: {runner.work_dir}/{name}.'
        return f'{text} Plot the decisions so far with: mmela report {runner.work_dir}'

    def _next_commands(self, runner) -> str:
        """List useful commands after a training with decisions."""
        lines = [
            'Next:',
            f'  mmela report {runner.work_dir}  # a page on what was pruned and why',
        ]
        saved = runner.message_hub.get_info('last_ckpt')
        if saved and runner.cfg.filename:
            config = osp.join(runner.work_dir, osp.basename(runner.cfg.filename))
            lines += [
                f'  mmela test {config} {saved}',
                f'  mmela slim {config} {saved} slim.pth --out-config slim.py'
                '  # drops the weights of pruned attentions',
                '  mmela export slim.py slim.pth backbone.onnx --backbone',
            ]
        return '\n'.join(lines)

    def _log_begin(self, runner) -> None:
        measured = self._pruning.open
        if measured is None or measured.announced:
            return
        measured.announced = True
        unit = 'epoch' if self._pruning.by_epoch else 'iteration'
        runner.logger.info(
            f'Measuring layer attentions during {unit} {_span(measured.window)}; '
            'the pruning decision follows at the end.'
        )

    def _log_new(self, runner) -> None:
        """Log the decisions made since the last call."""
        for decision in self._pruning.history[self._told :]:
            self._log(runner, decision)
        self._told = len(self._pruning.history)

    def _log(self, runner, decision: PruningDecision) -> None:
        before, after = len(decision.layers), len(decision.active)
        self._step_times.record(runner, before, decision.iteration)
        runner.logger.info(
            f'Layer attention pruning after {decision.unit} {_span(decision.window)}: '
            f'{before} -> {after} active attentions, {self._pruning.policy}\n'
            + decision_table(decision.layers)
        )
        if decision.warning:
            runner.logger.warning(f'{decision.warning}.')
        runner.logger.info(self._files(runner))
        scalars = {'layer_attention/active': after}
        for layer in decision.layers:
            for key, value in (
                ('kl', layer.divergence),
                ('kl_shape', layer.shape),
                ('kl_own', layer.own),
                ('normalized', layer.normalized),
                ('mapped', layer.mapped),
                ('pruned', int(layer.pruned)),
            ):
                if value is not None:
                    scalars[f'layer_attention/{key}/{layer.name}'] = value
        runner.visualizer.add_scalars(scalars, step=decision.iteration)
        self._show(runner, decision)

    def _show(self, runner, decision: PruningDecision) -> None:
        """Send pictures of a decision to experiment trackers.

        A run that logs only to files needs none: ``mmela report`` draws them.
        """
        backends = runner.visualizer._vis_backends.values()
        files = all(isinstance(backend, LocalVisBackend) for backend in backends)
        if files or not is_main_process():
            return
        # Imported here because matplotlib is slow to import and few runs need it
        from ..visualization.decision_plots import kl_plot, table_plot
        from ..visualization.drawing import render

        _, last = decision.window or (None, None)
        name = f'pruning_{decision.unit}_{last}'
        for suffix, plot in (('', kl_plot), ('_table', table_plot)):
            # MLflow takes the format from the name.
            runner.visualizer.add_image(
                f'{name}{suffix}.png', render(plot(decision)), step=decision.iteration
            )


def _span(window: Any) -> str:
    return '-'.join(map(str, sorted(set(window))))


def _pruning_hook(runner) -> Optional[Any]:
    """The pruning hook of a run, or any other with a history of decisions."""
    return next((hook for hook in runner.hooks if hasattr(hook, 'history')), None)
