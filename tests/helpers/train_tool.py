"""Stand-in for tools/train.py that trains a single number within milliseconds.

Checkpoints, logs and arguments are like those of a real training. The config can make
it fail: it is killed once in epoch ``die_at``, always exits with code 3 in epoch
``fail_at``, and waits in epoch 2 until a file ``hold`` exists.
"""

import argparse
import json
import os
import runpy
import signal
import time
import zipfile
from ast import literal_eval
from pathlib import Path


def save(path, state):
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr('state', str(state))


def load(path):
    with zipfile.ZipFile(path) as file:
        return int(file.read('state'))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('config')
    parser.add_argument('--work-dir', type=Path)
    parser.add_argument('--resume', type=Path)
    parser.add_argument('--cfg-options', nargs='*', default=[])
    args = parser.parse_args()
    cfg = {k: v for k, v in runpy.run_path(args.config).items() if k[0] != '_'}
    options = dict(option.split('=', 1) for option in args.cfg_options)
    for key in ('die_at', 'fail_at', 'factor'):
        cfg[key] = literal_eval(options.get(key, str(cfg[key])))
    seed, first = int(options['randomness.seed']), 1
    state = seed + 1
    if 'load_from' in options:
        state = load(options['load_from'])
    if args.resume:
        state, first = load(args.resume), 1 + int(args.resume.stem.split('_')[1])
    log = args.work_dir / str(time.time_ns()) / 'vis_data' / 'scalars.json'
    log.parent.mkdir(parents=True)
    (args.work_dir / 'process').write_text(f'{os.getpid()} {os.getppid()}')
    hold = options.get('hold', cfg['hold'])
    last = cfg['train_cfg']['max_epochs']
    with open(log, 'a', buffering=1) as file:
        for epoch in range(first, last + 1):
            while epoch == 2 and hold and not os.path.exists(hold):
                time.sleep(0.02)
            died = args.work_dir / 'died'
            if epoch == cfg['die_at'] and not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if epoch == cfg['fail_at']:
                print(f'no luck in epoch {epoch}')
                raise SystemExit(3)
            state = (cfg['factor'] * state + seed) % 1009
            record = dict(loss=1.0, time=0.5, epoch=epoch, iter=epoch, step=epoch)
            file.write(json.dumps(record) + '\n')
            print(f'Epoch(train)  [{epoch}][ 1/1]', flush=True)
            save(args.work_dir / f'epoch_{epoch}.pth', state)
            metrics = {'accuracy/top1': state / 10.09, 'time': 0.1, 'step': epoch}
            file.write(json.dumps(metrics) + '\n')


if __name__ == '__main__':
    main()
