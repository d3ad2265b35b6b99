"""Calls outside any transformation: what is compiled for them, and how to get there fast.

The first call goes through a ``jax.jit`` of the flattened function, which brings all of JAX's caching; JAX's C++ makes
further calls like it on its own. What JAX cannot know is decided here, at the first call of each signature: the arrays
that the function closes over, which become arguments instead of HLO constants, and which leaves to donate. XLA gets
only those whose buffer the plan takes over, and in an order of results for which its own pairing of donated arguments
with results is the plan's: any other pair would cost a copy.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import warnings
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import jax
import numpy as np

from jax_mpk.capture import jaxprs
from jax_mpk.runtime import layouts, pipeline
from jax_mpk.runtime.artifact import Artifact
from jax_mpk.runtime.call import Options, lift, megakernel_p, plan_target
from jax_mpk.runtime.constants import Constants, Copies, is_small
from jax_mpk.runtime.jax_internals import (
    core,
    eager,
    fast_calls,
    first_call,
    jax_config,
    making,
    name_arguments,
    parse_arguments,
    tree_util,
    weakref_lru_cache,
)
from jax_mpk.runtime.layouts import Lies
from jax_mpk.runtime.split import Split, is_whole, refuse_effects, refuse_high_types, split, undifferentiable
from jax_mpk.runtime.timing import timed

T = TypeVar("T")

_MAX_SIGNATURES = 4096
#: How often a call gets a new entry point before it takes one that fits any trace.
_MAX_ATTEMPTS = 4


@dataclass(frozen=True)
class KernelCall(Generic[T]):
    """One megakernel of a traced function.

    Attributes:
      jaxpr, donated, name: parameters of the primitive.
      operands: what was asked about each of its operands.
    """

    jaxpr: Any
    donated: tuple[bool, ...]
    name: str
    operands: tuple[T, ...]


@dataclass(frozen=True)
class Traced:
    """A function traced for some avals, ready to be bound.

    Attributes:
      jaxpr: closed jaxpr without constants.
      consts: values of its first arguments.
      kept: positions, among the function's array arguments, of its further arguments.
      donated: one flag per argument of ``jaxpr``.
      out_tree: structure of the results.
      float0: positions and shapes, among the function's results, of those of type float0. They hold nothing, and are
        no results of ``jaxpr``.
      parts: None where the jaxpr is one megakernel; else the jaxpr consists of several and of other equations.
    """

    jaxpr: Any
    consts: tuple[Any, ...]
    kept: tuple[int, ...]
    donated: tuple[bool, ...]
    out_tree: Any
    float0: tuple[tuple[int, tuple[int, ...]], ...] = ()
    parts: Split | None = None

    def operands(self, arguments: Sequence[Any]) -> list[Any]:
        """What to bind the primitive to."""
        return [*self.consts, *(arguments[i] for i in self.kept)]

    def lies(self, arguments: Sequence[Lies]) -> list[Lies]:
        """How the operands lie if the function's array arguments lie so."""
        return [*map(layouts.of_array, self.consts), *(arguments[i] for i in self.kept)]

    def calls(self, name: str, operands: Sequence[T], other: T) -> list[KernelCall[T]]:
        """Every megakernel of the function.

        Args:
          name: of the function.
          operands: something about each operand of ``jaxpr``.
          other: the same about whatever is computed outside megakernels.
        """
        if self.parts is None:
            return [KernelCall(self.jaxpr, self.donated, name, tuple(operands))]
        known: dict[Any, T] = dict(zip(jaxprs.open_jaxpr(self.jaxpr)[0].invars, operands, strict=True))
        return [
            KernelCall(
                eqn.params["jaxpr"],
                eqn.params["donated"],
                eqn.params["name"],
                tuple(known.get(v, other) for v in eqn.invars),
            )
            for eqn in self.parts.islands
        ]

    def results(self, computed: Sequence[Any]) -> list[Any]:
        """All results of the function, given those of ``jaxpr``."""
        results = list(computed)
        for position, shape in self.float0:
            results.insert(position, np.zeros(shape, jax.dtypes.float0))
        return results


@weakref_lru_cache
def _specialise(
    closed: Any, donated: tuple[bool, ...], out_tree: Any, name: str, options: Options, may_split: bool
) -> Traced:
    lifted, consts = lift(closed)
    jaxpr, _ = jaxprs.open_jaxpr(lifted)
    float0 = tuple((i, v.shape) for i, v in enumerate(lifted.out_avals) if _is_float0(v))
    if float0:
        outvars = [v for v in jaxpr.outvars if not _is_float0(v.aval)]
        jaxpr = jaxprs.make_jaxpr(jaxpr.invars, outvars, jaxpr.eqns, jaxpr)
    jaxpr, used = jaxprs.eliminate_dead_code(jaxpr, len(jaxpr.invars))
    kept = tuple(i for i, use in enumerate(used[len(consts) :]) if use)
    kept_consts = tuple(c for c, use in zip(consts, used[: len(consts)], strict=True) if use)
    flags = (False,) * len(kept_consts) + tuple(donated[i] for i in kept)
    parts = None
    if not may_split:
        refuse_effects(jaxpr)
        refuse_high_types(jaxpr)
    elif not is_whole(jaxpr, options):
        parts = split(jaxpr, flags, name, options)
        jaxpr = parts.jaxpr
    return Traced(jaxprs.close_jaxpr(jaxpr), kept_consts, kept, flags, out_tree, float0, parts)


def _is_float0(aval: Any) -> bool:
    return getattr(aval, "dtype", None) == jax.dtypes.float0


class _Respecialise(Exception):
    """Raised while tracing: these avals need other constants or other donations than this entry has."""


@dataclass(frozen=True)
class Donations:
    """What becomes of the arguments that a call donates.

    Attributes:
      reused: the plan takes their buffers over.
      deleted: it does not, though results of their types exist: ``jax.jit`` deletes these too.
    """

    reused: frozenset[int]
    deleted: frozenset[int]

    @classmethod
    def of(cls, jaxpr: Any, donated: Sequence[bool], aliases: Sequence[tuple[int, int]]) -> Donations:
        """Those of the operands of a closed jaxpr, given which of them the plan takes over for which results."""
        reused = frozenset(operand for _, operand in aliases)
        paired = {operand for _, operand in _pairs(donated, jaxpr.in_avals, jaxpr.out_avals)}
        return cls(reused, frozenset(paired - reused))

    def renumbered(self, number: Callable[[int], int]) -> Donations:
        """The same arguments under other numbers."""
        return Donations(frozenset(map(number, self.reused)), frozenset(map(number, self.deleted)))

    def delete(self, arguments: Sequence[Any], results: Any) -> None:
        """Deletes what XLA did not, once the call is on its way."""
        if not self.deleted:
            return
        kept = {id(result) for result in jax.tree.leaves(results)}
        for i in self.deleted:
            argument = arguments[i]
            if isinstance(argument, jax.Array) and id(argument) not in kept:
                argument.delete()  # a call that still runs keeps the memory


@dataclass(frozen=True)
class Entry:
    """A compiled entry point.

    Attributes:
      jitted: takes ``consts`` and the leaves.
      consts: closed-over arrays passed as arguments.
      donations: what becomes of donated leaves.
      key: types of the leaves it was made for, and JAX's settings then.
    """

    jitted: Any
    consts: tuple[Any, ...]
    donations: Donations
    key: Any


@jax.tree_util.register_pytree_node_class
class Reordered:
    """Results in the order XLA returns them.

    JAX takes them apart and puts them together more than once, and C++ expects XLA's order then: they stay one of these
    until the call is over, see :func:`restored`.
    """

    def __init__(self, results: Sequence[Any], order: tuple[int, ...], out_tree: Any):
        self._results = results
        self._order = order
        self._out_tree = out_tree

    def tree_flatten(self) -> tuple[Sequence[Any], tuple[tuple[int, ...], Any]]:
        return tuple(self._results[i] for i in self._order), (self._order, self._out_tree)

    @classmethod
    def tree_unflatten(cls, aux: tuple[tuple[int, ...], Any], leaves: Sequence[Any]) -> Any:
        order, out_tree = aux
        results: list[Any] = [None] * len(order)
        for leaf, position in zip(leaves, order, strict=True):
            results[position] = leaf
        return cls(results, order, out_tree)

    def restored(self) -> Any:
        """What the function returned."""
        return self._out_tree.unflatten(self._results)

    def to_restore(self) -> _Restored:
        """The same as a tree that JAX puts together as what the function returned."""
        return _Restored(self._results, self._order, self._out_tree)


@jax.tree_util.register_pytree_node_class
class _Restored(Reordered):
    @classmethod
    def tree_unflatten(cls, aux: tuple[tuple[int, ...], Any], leaves: Sequence[Any]) -> Any:
        return super().tree_unflatten(aux, leaves).restored()


def restored(results: Any) -> Any:
    """What the function returned, given what its entry point did."""
    return results.restored() if isinstance(results, Reordered) else results


class CallSite:
    """A megakernelized function: traces it, binds the primitive, and keeps compiled entry points."""

    def __init__(self, function: Callable[..., Any], name: str, options: Options, may_split: bool, **jit_options: Any):
        self.name = name
        self.options = dataclasses.replace(options, site=weakref.ref(self))
        self.may_split = may_split
        # Used to trace only. All checks of arguments, all their error messages and the trace cache are JAX's.
        self.tracer: Any = jax.jit(function, **jit_options)
        self.compiled: OrderedDict[Any, Any] = OrderedDict()
        self._entries: dict[Any, Entry | dict[Any, Entry]] = {}
        self._lock = threading.Lock()
        self._copies: Copies = weakref.WeakValueDictionary()
        self.call = self._fast_call()

    def _fast_call(self) -> Callable[..., Any]:
        """What calls the function eagerly: JAX's C++, which learns how from first calls."""
        return fast_calls(self.name, self.tracer, self._first_call) or self._call

    def _first_call(self, /, *args: Any, **kwargs: Any) -> tuple[Any, Any, bool]:
        try:
            entry, leaves, (results, data, forget) = self._run(first_call, args, kwargs)
        except BaseException:
            # C++ would leave calls like this one to Python for good, even if only the first was interrupted.
            self.call = self._fast_call()
            raise
        if isinstance(results, Reordered) and data is not None:
            data = making(data, results.to_restore())
        results = restored(results)
        if entry.donations.deleted:
            # Deleting them takes the leaves of every call, which C++ does not hand out.
            self.call, data = self._call, None
            entry.donations.delete(leaves, results)
        return results, data, forget

    def _call(self, /, *args: Any, **kwargs: Any) -> Any:
        entry, leaves, results = self._run(_apply, args, kwargs)
        entry.donations.delete(leaves, results)
        return results

    def _run(
        self, call: Callable[[Any, Sequence[Any], Sequence[Any]], T], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[Entry, list[Any], T]:
        """What ``call`` returns for the entry point that fits, its closed-over arrays and the leaves of the call."""
        signature, leaves = parse_arguments(self.tracer, args, kwargs)
        for _ in range(1 + _MAX_ATTEMPTS):
            entry = self._entries.get(signature)
            if type(entry) is not Entry:
                entry = self._entry(signature, leaves, args, kwargs)
            try:
                return entry, leaves, call(entry.jitted, entry.consts, leaves)
            except _Respecialise:
                self._forget(signature, entry, leaves)
        # The function differs from trace to trace, and JAX keeps none (jax.checking_leaks).
        traced, _ = self.trace(args, kwargs)
        entry = self._make_entry(traced, args, kwargs, leaves, any_trace=True)
        return entry, leaves, call(entry.jitted, entry.consts, leaves)

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Calls the function under a transformation."""
        traced, arguments = self.trace(args, kwargs)
        return traced.out_tree.unflatten(traced.results(self._bind(traced, traced.operands(arguments))))

    def trace(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Traced, list[Any]]:
        """Traces the function; also returns its array arguments, closed-over tracers first."""
        with timed("trace"):
            traced = self.tracer.trace(*args, **kwargs)
        _, leaves = parse_arguments(self.tracer, args, kwargs)
        return self._specialised(traced), [*traced._consts, *leaves]

    def _specialised(self, traced: Any) -> Traced:
        donated = tuple(traced._params["donated_invars"])
        return _specialise(traced.jaxpr, donated, traced.out_tree, self.name, self.options, self.may_split)

    def _bind(self, traced: Traced, operands: Sequence[Any]) -> Sequence[Any]:
        jaxpr, _ = jaxprs.open_jaxpr(traced.jaxpr)
        if traced.parts is not None:
            return jax.core.eval_jaxpr(jaxpr, [], *undifferentiable(operands, jaxpr, self.name))
        if not jaxpr.outvars and not jaxpr.eqns:
            return []
        return megakernel_p.bind(
            *operands, jaxpr=traced.jaxpr, donated=traced.donated, name=self.name, options=self.options
        )

    @functools.cached_property
    def jitted(self) -> Any:
        """The function under an outer ``jax.jit`` with the same options."""

        def bound(*args: Any, **kwargs: Any) -> Any:
            return self.bind(args, kwargs)

        info = self.tracer._jit_info
        return jax.jit(
            functools.wraps(self.tracer.__wrapped__)(bound),
            donate_argnums=info.donate_argnums,
            donate_argnames=info.donate_argnames,
            static_argnums=info.static_argnums,
            static_argnames=info.static_argnames,
        )

    def clear_cache(self) -> None:
        """Forgets all entry points and traces."""
        self._entries.clear()
        self.compiled.clear()
        self.tracer.clear_cache()
        self.call = self._fast_call()
        self.__dict__.pop("jitted", None)

    # -- entry points ------------------------------------------------------------------------------------------

    def lower(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Traced, Entry, list[Any], Any]:
        """The function traced for these arguments, an entry point for them, their leaves and JAX's ``args_info``."""
        with timed("trace"):
            traced = self.tracer.trace(*args, **kwargs)
        _, leaves = parse_arguments(self.tracer, args, kwargs)
        made = self._specialised(traced)
        return made, self._make_entry(made, args, kwargs, leaves), leaves, traced.args_info

    def _entry(self, signature: Any, leaves: list[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Entry:
        known = self._entries.get(signature)
        if isinstance(known, dict) and (key := _entry_key(leaves)) in known:
            return known[key]
        traced, _ = self.trace(args, kwargs)
        _warn_of_unusable_donations(traced)
        entry = self._make_entry(traced, args, kwargs, leaves)
        with self._lock:
            known = self._entries.get(signature)
            if isinstance(known, dict):
                known[entry.key] = entry
            else:
                if len(self._entries) >= _MAX_SIGNATURES:
                    del self._entries[next(iter(self._entries))]
                self._entries[signature] = entry
        return entry

    def _forget(self, signature: Any, entry: Entry, leaves: list[Any]) -> None:
        """Drops an entry that no longer fits; one that fits other types of arguments stays, for those."""
        with self._lock:
            known = self._entries.get(signature)
            if known is entry:
                if entry.key == _entry_key(leaves):
                    del self._entries[signature]
                else:
                    self._entries[signature] = {entry.key: entry}
            elif isinstance(known, dict) and known.get(entry.key) is entry:
                del known[entry.key]

    def _make_entry(
        self,
        traced: Traced,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        leaves: list[Any],
        any_trace: bool = False,
    ) -> Entry:
        """Makes an entry point.

        Args:
          traced: the function for these arguments.
          args: of the call.
          kwargs: of the call.
          leaves: of the call.
          any_trace: should the function be traced anew, make do with these donations, and let constants that are not
            known yet go into the HLO.
        """
        constants = Constants(traced.consts, self._copies)
        consts = constants.values
        lies = [layouts.of_array(leaf) for leaf in leaves]
        donations = self._donations(traced, lies)
        rebuild = rebuilder(self.tracer, args, kwargs, leaves)

        def entry_point(*operands: Any) -> Any:
            own, arguments = operands[: len(consts)], operands[len(consts) :]
            new_args, new_kwargs = rebuild(arguments)
            if eager():
                # JAX looks for the operation that made a NaN: it has to see them all.
                return self.tracer.__wrapped__(*new_args, **new_kwargs)
            now, all_arguments = self.trace(new_args, new_kwargs)
            if self._donations(now, lies) != donations and not any_trace:
                raise _Respecialise
            values = []
            for value in now.consts:
                if not is_small(value):
                    position = constants.find(value)
                    if position is not None:
                        value = own[position]
                    elif not any_trace:
                        raise _Respecialise
                values.append(value)
            results = self._bind(now, [*values, *(all_arguments[i] for i in now.kept)])
            order = _result_order(now, self._aliases(now, lies))
            results = now.results(results)
            if order == tuple(range(len(order))):
                return now.out_tree.unflatten(results)
            rest = [i for i, _ in now.float0]
            computed = [i for i in range(len(results)) if i not in rest]
            order = (*(computed[i] for i in order), *rest)
            return Reordered(results, order, now.out_tree)

        entry_point.__name__ = entry_point.__qualname__ = self.name
        name_arguments(entry_point, len(consts), self.tracer, args, kwargs)
        donate_argnums = tuple(len(consts) + i for i in sorted(donations.reused))
        return Entry(jax.jit(entry_point, donate_argnums=donate_argnums), consts, donations, _entry_key(leaves))

    def _aliases(self, traced: Traced, lies: Sequence[Lies]) -> tuple[tuple[int, int], ...]:
        if not any(traced.donated):
            return ()
        if traced.parts is not None:
            return tuple(_pairs(traced.donated, traced.jaxpr.in_avals, traced.jaxpr.out_avals))
        # Layouts decide nothing about aliases; with those of the call, this is the plan that it will run.
        return _artifact(traced.jaxpr, traced.donated, self.name, self.options, traced.lies(lies)).aliases

    def _donations(self, traced: Traced, lies: Sequence[Lies]) -> Donations:
        first = len(traced.consts)
        donations = Donations.of(traced.jaxpr, traced.donated, self._aliases(traced, lies))
        return donations.renumbered(lambda operand: traced.kept[operand - first])


def _apply(jitted: Any, consts: Sequence[Any], leaves: Sequence[Any]) -> Any:
    return restored(jitted(*consts, *leaves))


def _artifact(jaxpr: Any, donated: tuple[bool, ...], name: str, options: Options, lies: Sequence[Lies]) -> Artifact:
    target = plan_target(options)
    declared = pipeline.operand_layouts(jaxpr, donated, target, lies)
    return pipeline.artifact(jaxpr, donated, name, target, declared)


def _entry_key(leaves: Sequence[Any]) -> Any:
    return tuple(core.shaped_abstractify(x) for x in leaves), jax_config.trace_context()


def rebuilder(
    tracer: Any, args: Sequence[Any], kwargs: dict[str, Any], leaves: list[Any]
) -> Callable[[Sequence[Any]], tuple[tuple[Any, ...], dict[str, Any]]]:
    """A function that puts other leaves in the place of those of a call; static arguments stay as they are."""
    info = tracer._jit_info
    count = len(args)
    static = {i % count for i in info.static_argnums if -count <= i < count}
    dynamic = tuple(None if i in static else a for i, a in enumerate(args))
    named = {k: v for k, v in kwargs.items() if k not in info.static_argnames}
    flat, tree = tree_util.tracing_registry.flatten((dynamic, named))
    # Not the same objects where a class makes its leaves anew each time that it is flattened.
    if len(flat) != len(leaves):
        raise AssertionError("JAX flattens arguments in another way than expected")
    fixed = {i: args[i] for i in static}
    fixed_named = {k: v for k, v in kwargs.items() if k in info.static_argnames}

    def rebuild(new_leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        new_args, new_named = tree.unflatten(new_leaves)
        return tuple(fixed.get(i, a) for i, a in enumerate(new_args)), {**fixed_named, **new_named}

    return rebuild


def _pairs(donated: Sequence[bool], avals_in: Sequence[Any], avals_out: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """(result, argument) as JAX pairs them: each result with the first donated argument left of its type."""
    waiting: dict[Any, deque[int]] = defaultdict(deque)
    for i, (flag, aval) in enumerate(zip(donated, avals_in, strict=True)):
        if flag:
            waiting[_type(aval)].append(i)
    for j, aval in enumerate(avals_out):
        if waiting[_type(aval)]:
            yield j, waiting[_type(aval)].popleft()


def _result_order(traced: Traced, aliases: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    """An order of the results in which JAX pairs donated arguments as the plan does."""
    avals_out = traced.jaxpr.out_avals
    natural = tuple(range(len(avals_out)))
    used = {argument for _, argument in aliases}
    donated = [i in used for i in range(len(traced.donated))]
    if sorted(_pairs(donated, traced.jaxpr.in_avals, avals_out)) == sorted(aliases):
        return natural
    first = [result for result, _ in sorted(aliases, key=lambda pair: pair[1])]
    return (*first, *(i for i in natural if i not in set(first)))


def _warn_of_unusable_donations(traced: Traced) -> None:
    paired = {argument for _, argument in _pairs(traced.donated, traced.jaxpr.in_avals, traced.jaxpr.out_avals)}
    unusable = [
        aval.str_short()
        for i, (flag, aval) in enumerate(zip(traced.donated, traced.jaxpr.in_avals, strict=True))
        if flag and i not in paired
    ]
    if unusable:
        warnings.warn(
            f"Some donated buffers were not usable: {', '.join(unusable)}: no result has their shape and type.",
            stacklevel=6,
        )


def _type(aval: Any) -> tuple[Any, Any]:
    # Types of JAX's "hijax" layer need not have these.
    return getattr(aval, "shape", None), getattr(aval, "dtype", aval)


# --- The primitive, applied to values ----------------------------------------------------------------------------


#: Compiled functions of call sites that no longer exist.
_orphans: OrderedDict[Any, Any] = OrderedDict()
_MAX_COMPILED = 64


@megakernel_p.def_impl  # type: ignore[untyped-decorator]
def _run(*operands: Any, jaxpr: Any, donated: tuple[bool, ...], name: str, options: Options) -> Any:
    """Applies the primitive to arrays: eager calls under jax.vmap and the like end here."""
    site = options.site() if options.site is not None else None
    cache = _orphans if site is None else site.compiled
    key = (id(jaxpr), donated, name, options)
    if key not in cache:
        if len(cache) >= _MAX_COMPILED:
            cache.popitem(last=False)
        # The function keeps the jaxpr, so its id stays its own.
        cache[key] = _compile(jaxpr, donated, name, options, [layouts.of_array(x) for x in operands])
    compiled, donations = cache[key]
    with jax.disable_jit(False):
        results = restored(compiled(*operands))
    donations.delete(operands, results)
    return results


def _compile(
    jaxpr: Any, donated: tuple[bool, ...], name: str, options: Options, lies: Sequence[Lies]
) -> tuple[Any, Donations]:
    aliases: tuple[tuple[int, int], ...] = ()
    if any(donated):
        aliases = _artifact(jaxpr, donated, name, options, lies).aliases
    out_tree = jax.tree_util.tree_structure([0] * len(jaxpr.out_avals))
    order = _result_order(Traced(jaxpr, (), (), donated, out_tree), aliases)

    def entry_point(*operands: Any) -> Any:
        if eager():
            # As in CallSite: JAX looks for the operation that made a NaN.
            return jax.core.eval_jaxpr(jaxprs.open_jaxpr(jaxpr)[0], [], *operands)
        results = megakernel_p.bind(*operands, jaxpr=jaxpr, donated=donated, name=name, options=options)
        return Reordered(results, order, out_tree)

    entry_point.__name__ = entry_point.__qualname__ = name
    donations = Donations.of(jaxpr, donated, aliases)
    return jax.jit(entry_point, donate_argnums=tuple(sorted(donations.reused))), donations
