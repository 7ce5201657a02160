"""The one place that knows of devices: which there are, and what lies on which.

A program is written for one device and its share of the rows. `Devices.program` maps it over
all devices of all processes, by `jax.pmap` or by `jax.shard_map`; inside, `total` adds up over
them. Everything but the rows is replicated: it is computed everywhere, from sums that are the same
everywhere, so it stays the same without being sent.

Row r of a batch lies on device r mod N, in place r div N. So every device has its part of any
first few rows, and what a device has too few of at the end is filled up with rows of weight 0.
"""

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ibau_jax.devices import processes
from ibau_jax.errors import InputError, check_name

AXIS = "devices"
MAPPINGS = ("pmap", "shard_map")
Tree = Any


class Devices(NamedTuple):
    """The devices of a run, in the order of their shares; `devices` finds them.

    Attributes:
      all: `jax.Device` objects.
      mapping: what maps a program over them, of `MAPPINGS`. Both give the same numbers and the
        same messages; `jax.pmap`, which is implemented by the other, is in maintenance.
    """

    all: tuple[Any, ...]
    mapping: str = "pmap"

    @property
    def axis(self) -> str | None:
        """The axis to sum over; None on one device, where there is nothing to add."""
        return AXIS if len(self.all) > 1 else None

    @property
    def local(self) -> list[int]:
        """Numbers of those that belong to this process."""
        here = jax.process_index()
        return [i for i, device in enumerate(self.all) if device.process_index == here]

    def numbers(self, device: int, count: int) -> np.ndarray:
        """Numbers in the whole batch of the first `count` rows on a device: int [count]."""
        return device + len(self.all) * np.arange(count)

    def compile(
        self,
        function: Callable,
        *args: Tree,
        rows: tuple[int, ...],
        donate: tuple[int, ...] = (),
    ) -> Callable:
        """`function(*args)` on all devices at once, compiled for arguments like `args`.

        Args:
          function: may use `total` and `numbers` with the axis `self.axis`; its result must be
            the same on all devices.
          args: the arguments in `rows` from `share`, the others from `replicate`: global arrays,
            which lie where the program wants them, so that a call moves none.
          donate: arguments whose memory the results may take.
        """
        mapped = self._map(function, len(args), rows, donate)
        # What a program draws for the whole batch, and cuts its own rows out of, begins with the
        # same numbers however many rows of padding there are, hence on any number of devices.
        with jax.threefry_partitionable(True):
            return mapped.lower(*args).compile()

    def program(
        self,
        function: Callable,
        *,
        rows: tuple[int, ...] = (),
        donate: tuple[int, ...] = (),
        compiling: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    ) -> Callable:
        """`function` on all devices, compiled at its first call for arguments like those.

        Whole numbers among the arguments are replicated. On a CPU each call waits for its result;
        an accelerator computes on while the next calls are made, until something is `read`.

        Args:
          rows, donate: see `compile`.
          compiling: entered while it compiles, for example to take the time.

        Raises:
          LostProcess: by a call, where a collective failed.
        """
        compiled: list[Callable] = []
        waits = self.all[0].platform == "cpu"

        def call(*args: Tree) -> Tree:
            args = tuple(self.replicate(np.int32(a)) if isinstance(a, int) else a for a in args)
            if not compiled:
                with compiling():
                    compiled.append(self.compile(function, *args, rows=rows, donate=donate))
            with processes.watch():
                result = compiled[0](*args)
                return jax.block_until_ready(result) if waits else result

        return call

    def share(self, rows_of: Callable[[int], Tree]) -> Tree:
        """Put on each device of this process its own rows: `rows_of(number)`, NumPy arrays."""
        parts = [jax.tree.map(lambda a: np.asarray(a)[None], rows_of(i)) for i in self.local]
        sharding = NamedSharding(self._mesh, PartitionSpec(AXIS))

        def join(*arrays):
            pieces = [
                jax.device_put(a, self.all[i]) for a, i in zip(arrays, self.local, strict=True)
            ]
            shape = (len(self.all), *arrays[0].shape[1:])
            return jax.make_array_from_single_device_arrays(shape, sharding, pieces)

        return jax.tree.map(join, *parts)

    def replicate(self, tree: Tree) -> Tree:
        """Put the same arrays (or random keys) on every device.

        Raises:
          InputError: a key on several devices whose draws would depend on their number.
        """
        sharding = NamedSharding(self._mesh, PartitionSpec())

        def put(leaf):
            if _is_key(leaf):
                kind = jax.random.key_impl(leaf)
                if len(self.all) > 1 and kind != "threefry2x32":
                    raise InputError(
                        f"the random key is of the kind {kind!r}, whose draws depend on the number "
                        "of devices: expected jax.random.key(seed, impl='threefry2x32'), or one "
                        "device"
                    )
                return jax.random.wrap_key_data(put(jax.random.key_data(leaf)), impl=kind)
            if not isinstance(leaf, np.ndarray) or leaf.dtype.itemsize == 8:
                leaf = np.asarray(jnp.asarray(leaf))  # in the precision that JAX is set to
            return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

        return jax.tree.map(put, tree)

    def one(self, tree: Tree) -> Tree:
        """This process's own copy of replicated arrays."""
        return jax.tree.map(lambda a: a.addressable_data(0), tree)

    def read(self, tree: Tree) -> Tree:
        """Replicated arrays as NumPy's; waits until they are there.

        Raises:
          LostProcess: a collective that leads to them failed.
        """
        with processes.watch():
            return jax.tree.map(np.asarray, self.one(tree))

    def check_equal(self, **trees: Tree) -> None:
        """Raise where replicated arrays differ between devices, by one bit or more.

        Compares a sum over the bits of each array, so little is sent.

        Raises:
          RuntimeError: names the array and the devices.
          LostProcess: another process of this run is gone.
        """
        if len(self.all) == 1:
            return
        leaves = jax.tree_util.tree_leaves_with_path(jax.tree.map(_plain, trees))
        values = [leaf for _, leaf in leaves]
        marker = self.share(lambda i: np.zeros(()))
        with processes.watch():
            sums = np.asarray(self.one(_gather(self)(marker, values)))
        for (path, _), found in zip(leaves, sums.T, strict=True):
            odd = np.flatnonzero(found != found[0])
            if len(odd):
                raise RuntimeError(
                    f"{jax.tree_util.keystr(path)} on device {self.all[odd[0]]} is not the one of "
                    f"device {self.all[0]}: the devices no longer compute the same; this is a bug "
                    "of ibau_jax or a fault of a device"
                )

    def _map(
        self, function: Callable, count: int, rows: tuple[int, ...], donate: tuple[int, ...] = ()
    ) -> Any:
        """`function` of so many arguments, mapped over the devices; see `compile`."""
        if self.mapping == "pmap" and rows:  # which does not map a program without any
            axes = tuple(0 if i in rows else None for i in range(count))
            return jax.pmap(
                function,
                axis_name=AXIS,
                in_axes=axes,
                out_axes=None,
                devices=self.all,
                donate_argnums=donate,
            )

        def own(*args):  # here a device's rows keep the axis of the devices, of length 1
            args = (jax.tree.map(lambda a: a[0], a) if i in rows else a for i, a in enumerate(args))
            return function(*args)

        specs = tuple(PartitionSpec(AXIS) if i in rows else PartitionSpec() for i in range(count))
        everywhere = PartitionSpec()
        mapped = jax.shard_map(
            own, mesh=self._mesh, in_specs=specs, out_specs=everywhere, check_vma=False
        )
        return jax.jit(mapped, donate_argnums=donate)

    @property
    def _mesh(self) -> Mesh:
        return Mesh(np.array(self.all), (AXIS,))


def devices(count: int | None = None, mapping: str = "pmap") -> Devices:
    """The first `count` devices, or all, of all processes; `mapping`: see `Devices`.

    Raises:
      InputError: there are fewer, or a process would have none.
    """
    check_name("mapping", mapping, MAPPINGS)
    numbers = range(jax.process_count())
    found = [d for i in numbers for d in jax.devices() if d.process_index == i]
    count = len(found) if count is None else count
    if not 1 <= count <= len(found):
        raise InputError(
            f"{count} devices were asked for: expected 1 to {len(found)}, what {len(found)} "
            f"{found[0].platform} device(s) in {len(numbers)} process(es) allow",
            argument="devices",
        )
    if count < len(found) and len(numbers) > 1:
        raise InputError(
            f"{count} of {len(found)} devices were asked for in {len(numbers)} processes: every "
            "process takes part with all of its devices; ask for no number",
            argument="devices",
        )
    return Devices(tuple(found[:count]), mapping)


def total(tree: Tree, axis: str | None) -> Tree:
    """The sum over the devices in one message (nothing to do without an axis)."""
    return tree if axis is None else lax.psum(tree, axis)


def numbers(count: int, axis: str | None) -> jax.Array:
    """`Devices.numbers` of the device that runs the program: int32 [count]."""
    if axis is None:
        return jnp.arange(count)
    return jnp.arange(count) * lax.axis_size(axis) + lax.axis_index(axis)


def own(whole: jax.Array, axis: str | None) -> jax.Array:
    """Of something for each row of the whole batch that of the rows of the device that runs this.

    As `whole[numbers(...)]`, without a gather.
    """
    if axis is None:
        return whole
    parts = whole.reshape(-1, lax.axis_size(axis), *whole.shape[1:])
    return lax.dynamic_index_in_dim(parts, lax.axis_index(axis), 1, keepdims=False)


def width(axis: str | None) -> int:
    """How many devices there are."""
    return 1 if axis is None else lax.axis_size(axis)


@functools.cache
def _gather(on: Devices) -> Callable:
    return on._map(_checksums, 2, rows=(0,))


def _checksums(_, arrays):
    return lax.all_gather(jnp.stack([_bits(array) for array in arrays]), AXIS)


def _plain(leaf):
    """Random keys as their numbers."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _is_key(leaf) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _bits(array: jax.Array) -> jax.Array:
    """A number that changes with any bit of an array, and with the order: uint32."""
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    words = lax.bitcast_convert_type(array, unsigned).ravel().astype(jnp.uint32)
    return jnp.sum(words * (2 * jnp.arange(words.size, dtype=jnp.uint32) + 1))
