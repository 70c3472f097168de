"""Compare inference of a network with different layer attentions.

As train_step.py, without gradients and with the network in evaluation mode:
class scores of a classifier, or detections of a detector. A detector with
random weights finds other proposals than a trained one; what follows its
backbone is the same for all variants.

Examples:
  python -m tools.benchmark.inference --net r50 --batch 32
  python -m tools.benchmark.inference --net faster-rcnn --device cuda \\
      --dtype fp16 --out faster-rcnn.json
"""

from .common import base_parser, set_up, write_results
from .compare import compare, table
from .networks import add_network_options


def parse_args(argv=None):
    parser = base_parser(__doc__, rounds=20)
    add_network_options(parser)
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    device = set_up(args)
    results = compare(args, device, train=False)
    print(table(results))
    write_results(args.out, results)


if __name__ == '__main__':
    main()
