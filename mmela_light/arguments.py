"""Arguments shared by several tools."""

import argparse
from typing import Any, List


def tool_parser(name: str, text: str) -> argparse.ArgumentParser:
    """Make the parser of a tool.

    Args:
        name (str): The command of ``mmela`` that runs the tool.
        text (str): Description with examples, shown without reformatting.

    Returns:
        argparse.ArgumentParser: A parser without arguments.
    """
    return argparse.ArgumentParser(
        prog=f'mmela {name}',
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


class Settings(argparse.Action):
    """``KEY=VALUE ...`` as a dict, parsed by mmengine's ``DictAction``.

    ``DictAction`` is only imported if there are values, because it imports torch.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: Any = None,
    ) -> None:
        from mmengine.config import DictAction

        action = DictAction(self.option_strings, self.dest, nargs=self.nargs)
        action(parser, namespace, values, option_string)


def add_cfg_options(
    parser: argparse.ArgumentParser, text: str = 'change settings of the config'
) -> None:
    """Add the option ``--cfg-options`` of the toolboxes' tools.

    Args:
        parser (argparse.ArgumentParser): Parser of a tool.
        text (str): Help text. Defaults to ``'change settings of the config'``.
    """
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=Settings,
        default={},
        metavar='KEY=VALUE',
        help=text,
    )


def show_usage(argv: List[str], text: str) -> None:
    """Print the usage of a tool that passes its arguments on, if requested, and exit.

    Args:
        argv (list[str]): Arguments of the tool. An empty list also prints the usage.
        text (str): The usage.

    Raises:
        SystemExit: With code 0, or code 2 if there are no arguments.
    """
    if not argv or argv[0] in ('-h', '--help'):
        print(text.strip())
        raise SystemExit(0 if argv else 2)
