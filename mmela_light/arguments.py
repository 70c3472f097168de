"""Arguments that several tools take."""

import argparse
from typing import Any, List


def tool_parser(name: str, text: str) -> argparse.ArgumentParser:
    """Make the parser of a tool.

    Args:
        name (str): The command of ``mmela`` that runs the tool.
        text (str): What the tool does, with examples; shown as it stands.

    Returns:
        argparse.ArgumentParser: A parser without arguments.
    """
    return argparse.ArgumentParser(
        prog=f'mmela {name}',
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


class Settings(argparse.Action):
    """``KEY=VALUE ...`` as a dict, by mmengine's ``DictAction``.

    Which is imported for values only, as it brings torch.
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
    """Add the option ``--cfg-options``, as the toolboxes' tools have it.

    Args:
        parser (argparse.ArgumentParser): Parser of a tool.
        text (str): Its help. Defaults to ``'change settings of the config'``.
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
    """End with the usage of a tool that hands its arguments on, if that is asked for.

    Args:
        argv (list[str]): Arguments of the tool. None at all asks for it, too.
        text (str): The usage.

    Raises:
        SystemExit: With code 0, or 2 where there are no arguments.
    """
    if not argv or argv[0] in ('-h', '--help'):
        print(text.strip())
        raise SystemExit(0 if argv else 2)
