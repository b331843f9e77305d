"""The compiled programs of a training: one step, and one look at validation examples."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.llama import Llama, Params
from lragent_jax.models.pytree import pytree
from lragent_jax.models.tensor_parallel import WHOLE
from lragent_jax.training.lora import Lora, Trained, layer_pairs
from lragent_jax.training.loss import losses_and_hits, summed_loss
from lragent_jax.training.mesh import current_mesh, cut_into_rows, replicated
from lragent_jax.training.options import Remat, TrainingOptions
from lragent_jax.training.packing import Batch, BatchShape, empty_batch


@pytree
class TrainState:
    """What a step changes: matrices, one adapter's or several's, AdamW's moments, f32, and its count of steps."""

    lora: Lora
    optimizer: Any


@pytree
class StepMetrics:
    """Mean loss per output token in nats, and the gradient's norm before it is clipped."""

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]


def learning_rate(options: TrainingOptions, step: int, num_steps: int) -> float:
    """The rate of a step, counted from 0: a straight line up, then half a cosine down."""
    warmup = num_steps // 20 if options.warmup is None else min(options.warmup, num_steps)
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    return options.learning_rate * 0.5 * (1 + np.cos(np.pi * (step - warmup) / (num_steps - warmup)))


class Programs:
    """What runs on the device, for all agents of one training; compiled once per shape of batch.

    The mesh that is current when it is made is used throughout.
    """

    def __init__(self, config: LlamaConfig, graphdef: nnx.GraphDef, params: Params, options: TrainingOptions):
        self._config, self._graphdef, self._params, self._options = config, graphdef, params, options
        self._dtype = jax.tree.leaves(params)[0].dtype
        self._mesh = current_mesh()
        # AdamW (arXiv 1711.05101) but for the rate, an argument: agents of other lengths share programs.
        self._optimizer = optax.chain(
            optax.clip_by_global_norm(options.max_grad_norm),
            optax.scale_by_adam(),
            optax.add_decayed_weights(options.weight_decay),
        )
        self._threads = ThreadPoolExecutor(thread_name_prefix="compile")
        self._compiled: dict[tuple[str, BatchShape], Future[Callable[..., Any]]] = {}

    def initial_state(self, lora: Lora) -> TrainState:
        """In memory of its own, on every device of the mesh."""
        lora = replicated(jax.tree.map(jnp.array, lora), self._mesh)
        return TrainState(lora=lora, optimizer=replicated(self._optimizer.init(lora), self._mesh))

    def compile(
        self, state: TrainState, trained: Trained, steps: Iterable[BatchShape], evaluations: Iterable[BatchShape]
    ) -> None:
        """Begins to compile what no agent needed before, the programs side by side; `wait`, or running one, waits."""
        rate, out_shardings = np.float32(0), None if self._mesh is None else NamedSharding(self._mesh, WHOLE)
        for shape in steps:
            jitted = jax.jit(self._stepper(self._remat(shape)), donate_argnums=2, out_shardings=out_shardings)
            self._compile(("step", shape), jitted, trained, state, rate)
        for shape in evaluations:
            self._compile(("evaluation", shape), jax.jit(self._evaluate), state.lora)

    def wait(self) -> None:
        """Until everything is compiled; raises what the compiler raised."""
        for program in self._compiled.values():
            program.result()

    def step(
        self, shape: BatchShape, trained: Trained, state: TrainState, batch: Batch, rate: float
    ) -> tuple[TrainState, StepMetrics]:
        """One step at a learning rate; the state that goes in is used up, and what is not `trained` stays as it is."""
        batch = cut_into_rows(batch, self._mesh)
        return self._compiled["step", shape].result()(self._params, trained, state, np.float32(rate), batch)

    def evaluation(self, shape: BatchShape, lora: Lora, batch: Batch) -> tuple[Array, Array]:
        """(loss, whether it scored best) of the output token of every slot, [B, M]"""
        return self._compiled["evaluation", shape].result()(self._params, lora, cut_into_rows(batch, self._mesh))

    def _compile(self, key: tuple[str, BatchShape], jitted: Any, *args: Any) -> None:
        if key not in self._compiled:
            # Traced here, where the mesh is current; XLA then works without the interpreter's lock.
            lowered = jitted.lower(self._params, *args, cut_into_rows(empty_batch(key[1]), self._mesh))
            self._compiled[key] = self._threads.submit(lowered.compile)

    def _stepper(self, remat: Remat) -> Callable[..., tuple[TrainState, StepMetrics]]:
        def step(params: Params, trained: Trained, state: TrainState, rate, batch: Batch):
            def total_loss(lora: Lora) -> Array:
                model, hidden = self._run(params, lora, batch, remat)
                return summed_loss(model, hidden, batch)

            total, gradient = jax.value_and_grad(total_loss)(state.lora)
            # Divided here and not in the loss: the backward pass, which may be in f16, works on ordinary numbers.
            count = jnp.maximum(batch.weights.sum(), 1)
            # What is trained is data, not structure: agents with and without shared matrices run one program.
            gradient = jax.tree.map(lambda keep, leaf: jnp.where(keep, leaf / count, 0), trained, gradient)
            updates, optimizer = self._optimizer.update(gradient, state.optimizer, state.lora)
            lora = jax.tree.map(
                lambda keep, leaf, update: jnp.where(keep, leaf - rate * update, leaf), trained, state.lora, updates
            )
            metrics = StepMetrics(loss=total / count, gradient_norm=_norm(gradient))
            return TrainState(lora=lora, optimizer=optimizer), metrics

        return step

    def _evaluate(self, params: Params, lora: Lora, batch: Batch) -> tuple[Array, Array]:
        model, hidden = self._run(params, lora, batch, "blocks")
        return losses_and_hits(model, hidden, batch)

    def _run(self, params: Params, lora: Lora, batch: Batch, remat: Remat) -> tuple[Llama, Float[Array, "B T D"]]:
        model = nnx.merge(self._graphdef, params)
        saveable = _products_and_attention if remat == "dots" else None
        pairs = layer_pairs(lora, self._options.scale, self._dtype)
        return model, model.packed(batch.rows, pairs, saveable=saveable, implementation=self._options.attention)

    def _remat(self, shape: BatchShape) -> Remat:
        """What the option says, or whether the products with weights take less than half of the device's memory."""
        if self._options.remat is not None:
            return self._options.remat
        widths = sum(out_width for _, out_width in self._config.projection_shapes().values())
        parts = 1 if self._mesh is None else self._mesh.size
        saved = shape.rows * shape.length * self._config.num_layers * widths * self._dtype.itemsize // parts
        memory = jax.devices()[0].memory_stats() or {}
        return "dots" if 2 * saved < memory.get("bytes_limit", 0) else "blocks"


def _products_and_attention(primitive: Any, *args: Any, **params: Any) -> bool:
    """A policy of `jax.checkpoint`: keeps what is costly to compute again."""
    if primitive.name.startswith("dot_product_attention_fwd"):  # cuDNN's, which would run once more for its residuals
        return True
    return bool(jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params))


def _norm(tree: Any) -> Float[Array, ""]:
    return jnp.sqrt(sum((jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(tree)), jnp.zeros(())))
