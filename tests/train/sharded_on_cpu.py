"""The `stillhouse` command where accelerate shards on the CPU, too.

accelerate shards on accelerators alone and, on the CPU, goes on with DDP without a word. Told that
these processes are those of an accelerator, it takes its FSDP2 path, over gloo.
"""

from accelerate.state import DistributedType, PartialState

_start = PartialState.__init__


def _start_as_accelerator(self, *arguments, **options):
    _start(self, *arguments, **options)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = _start_as_accelerator

if __name__ == "__main__":
    from stillhouse.cli import main

    main()
