"""Compare training steps of a network with different layer attentions.

Time and peak memory of forward, backward and SGD step of: the bare network
(resnet), MRLA-base in its published form (published), MLA, MRLA-base as
mmela computes it (mrla-base), MRLA-light, ELA with pruned attentions and KCLA. The
variants take turns, so that a drift of the machine hits all alike. Images,
labels and weights are random.

Examples:
  python -m tools.benchmark.train_step --net r50 --batch 8 --threads 2
  python -m tools.benchmark.train_step --net mask-rcnn --dtype fp16 \\
      --variants resnet published mrla-base ela --out mask-rcnn.json
  python -m tools.benchmark.train_step --net r50 --device cuda \\
      --variants resnet mrla-base:autograd mrla-base:triton
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
    results = compare(args, device, train=True)
    print(table(results))
    write_results(args.out, results)


if __name__ == '__main__':
    main()
