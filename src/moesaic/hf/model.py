"""The model classes: `MoesaicModel` (decoder) and `MoesaicForCausalLM` (with language-model head)."""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.utils.generic import can_return_tuple

from moesaic.errors import UnsupportedDecoding
from moesaic.hf.backbone import CONTEXT, Carried, build_backbone, moe_blocks
from moesaic.hf.configuration import MoesaicConfig
from moesaic.hf.experts import IMPLEMENTATION, check_implementation
from moesaic.hf.families import family_of
from moesaic.hf.forward import forward_context, num_tokens, positions_after, sequence_weights
from moesaic.hf.limits import check_needs, check_pipeline, check_vocabulary
from moesaic.hf.output import MoeCausalLMOutput, MoeModelOutput
from moesaic.hf.threads import Entered, entered_now, for_this_thread
from moesaic.layer import MoEBlock, OverrideFactory, Router, RoutingContext, override_of
from moesaic.layer.balance import BalanceObjective, Coefficients

logger = logging.getLogger(__name__)

RoutingListener = Callable[[RoutingContext], None]


class MoesaicPreTrainedModel(PreTrainedModel):
    """Loading, saving and capabilities shared by moesaic models; the backbone checks its own attention backends."""

    config: MoesaicConfig
    config_class = MoesaicConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict = {  # noqa: RUF012 (transformers declares no ClassVar)
        "e_score_correction_bias",
        "adaptive_coefficients",
        "score_threshold",
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, which documents the arguments; what a router's config freezes is frozen after it."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for module in model.modules():
            if isinstance(module, Router):
                module.freeze()
        return loaded

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Our own kernels unless something else is asked for.

        Raises:
            UnsupportedKernel: if the model makes picks of no expert and what is asked for is not known to skip them.
        """
        name = super().get_correct_experts_implementation(requested_experts or IMPLEMENTATION)
        check_implementation(name, self.config.spec)
        return name


class MoesaicModel(MoesaicPreTrainedModel):
    """A stock decoder with MoE blocks, without head.

    The child `backbone` is an instance of the stock family's base model: its own attention, norms, masks and caches
    run unchanged.

    Args:
        config: backbone and `moe` section.

    Attributes:
        batch_group: processes that train on parts of one micro-batch, as `RoutingContext.group`; None for this one alone.
            It counts in training only: whoever evaluates may do so alone.

    Raises:
        UnsupportedModel: if the backbone's family is not supported.
        ConfigError: if the `moe` section is invalid or does not fit the backbone.
    """

    batch_group: dist.ProcessGroup | None = None

    def __init__(self, config: MoesaicConfig) -> None:
        super().__init__(config)
        spec = config.spec
        check_pipeline(config, spec)
        check_vocabulary(config, spec)
        self.backbone = build_backbone(config.get_text_config(), config, spec)
        self._unservable = spec.unservable
        self._needs = spec.router.needs
        self._draws = "random_numbers" in spec.depends_on(training=True)
        self.gradient_checkpointing = False
        self._listeners: OrderedDict[int, RoutingListener] = OrderedDict()
        self._overrides: list[Entered[OverrideFactory]] = []
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def moe_blocks(self) -> dict[int, MoEBlock]:
        """The MoE blocks by decoder layer index."""
        return moe_blocks(self.backbone)

    def add_routing_listener(self, listener: RoutingListener) -> RemovableHandle:
        """Call `listener` with the routing of every forward pass from now on.

        Returns:
            A handle whose `remove()` ends it.
        """
        handle = RemovableHandle(self._listeners)
        self._listeners[handle.id] = listener
        return handle

    @contextlib.contextmanager
    def override_routing(self, factory: OverrideFactory, *, own_thread: bool = False) -> Iterator[None]:
        """Change the routing of every forward pass that begins inside this block; see `RoutingOverride`.

        Blocks may be nested: an inner override gets the routing that the outer one made. A thread that overrides follows its
        own overrides only; one that does not follows those of the thread that does, except with `own_thread`. A backward pass
        that recomputes layers after the block meets the override of its forward pass all the same.

        Args:
            factory: makes the override of one forward pass.
            own_thread: change forward passes of this thread alone.
        """
        entered = entered_now(factory, self._overrides, own_thread=own_thread)
        self._overrides = [*self._overrides, entered]
        try:
            yield
        finally:
            # Blocks may end in any order, as those of generators do.
            self._overrides = [other for other in self._overrides if other is not entered]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        modality_ids: Tensor | None = None,
        task_ids: Tensor | None = None,
        output_router_logits: bool | None = None,
        output_routing: bool = False,
        **kwargs: Any,
    ) -> MoeModelOutput:
        """Run the decoder.

        Args:
            input_ids: (B, S) token ids; or give `inputs_embeds` (B, S, D).
            attention_mask: (B, past + S), 1 for real tokens and 0 for padding, or what the backbone takes instead.
                A two-dimensional mask also tells balance losses and statistics which tokens are padding.
            position_ids: (B, S).
            past_key_values: cache of earlier tokens.
            inputs_embeds: embeddings instead of ids.
            modality_ids: (B, S) modality of each token, for routers that ask for it.
            task_ids: (B,) task of each sequence, for routers that ask for it.
            output_router_logits: return router logits; the default is the config's.
            output_routing: return the whole routing.
            **kwargs: passed to the backbone (`use_cache`, `output_hidden_states`, ...).

        Raises:
            UnsupportedDecoding: if a cache holds earlier tokens that the routing of these would depend on.
            ConfigError: if a router needs ids, modalities or tasks that are not given.
        """
        context = forward_context(input_ids, inputs_embeds, position_ids, attention_mask)
        if self._unservable is not None and past_key_values is not None and past_key_values.get_seq_length() > 0:
            raise UnsupportedDecoding(self._unservable)
        context.modality_T = None if modality_ids is None else modality_ids.reshape(-1)
        context.task_B = task_ids
        context.group = self.batch_group if self.training else None
        check_needs(context, self._needs)
        # Before the cache grows; routers are told only what the caller gave.
        given: Tensor = input_ids if input_ids is not None else inputs_embeds  # type: ignore[assignment]
        position_T = None
        overrides = for_this_thread(self._overrides) if self._overrides else []
        if self._listeners or overrides:
            position_T = positions_after(context, given.shape[1], attention_mask, past_key_values)
        if self._draws and self.training:
            # Drawn on the host, which gives the same on every device, and moved once for all layers.
            context.seed = torch.randint(2**62, ()).to(given.device)
        if overrides:
            placed = replace(context, position_T=position_T)
            context.override = override_of(overrides, placed, num_tokens(input_ids, inputs_embeds))
        # capture_outputs of the backbone would look for a recorder of router logits that dense families lack.
        output = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **{CONTEXT: Carried(context)},
            **kwargs,
        )
        for listener in self._listeners.values():
            listener(replace(context, position_T=position_T))
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        logits = tuple(routing.logits_TN for routing in context.records.values()) if output_router_logits else None
        return MoeModelOutput(
            last_hidden_state=output.last_hidden_state,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            router_logits=logits,
            routing=context if output_routing else None,
        )


class MoesaicForCausalLM(MoesaicPreTrainedModel, GenerationMixin):
    """A language model with MoE layers: `generate`, HF Trainer and PEFT work on it as on any other.

    Args:
        config: backbone and `moe` section.
    """

    def __init__(self, config: MoesaicConfig) -> None:
        super().__init__(config)
        self.model = MoesaicModel(config)
        text_config = config.get_text_config()
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        embeddings = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        # Kept because validating the spec in each forward pass is slow and can't be compiled.
        self.balance = config.spec.balance
        self.coefficients = Coefficients(self.balance, self._coefficients_of_layer)
        # Whether training must be told of its steps, and has not been.
        moves = any(block.moves_by_step for block in self.moe_blocks().values())
        self._waits_for_steps = moves or self.coefficients.scheduled
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def moe_blocks(self) -> dict[int, MoEBlock]:
        """The MoE blocks by decoder layer index."""
        return self.model.moe_blocks()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As `GenerationMixin.generate`, which documents the arguments; also `task_ids` (B,) and `modality_ids` (B, S) of
        the prompt, whose last token says what is generated.

        Raises:
            UnsupportedDecoding: if the routing of a token depends on more than that token and earlier ones.
        """
        unservable = self.config.spec.unservable
        if unservable is not None:
            raise UnsupportedDecoding(unservable)
        return super().generate(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue] its protocol names private attributes

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Inputs of one step of generation: of the modalities those of the tokens that are not in the cache."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)  # pyright: ignore[reportAttributeAccessIssue] as above
        if inputs.get("modality_ids") is not None:
            given = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
            inputs["modality_ids"] = inputs["modality_ids"][:, -given.shape[1] :]
        return inputs

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        known = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        modality_BS = known.get("modality_ids")
        if modality_BS is not None:
            new = kwargs.get("num_new_tokens", 1)
            known["modality_ids"] = torch.cat([modality_BS, modality_BS[:, -1:].expand(-1, new)], dim=1)
        return known

    def set_training_progress(self, fraction: float) -> None:
        """Say what share of the training is done, 0 to 1: coefficients with a schedule move there.

        Trainers call it before each step, also after resuming; until then it is 0.
        """
        self.coefficients.set_progress(fraction)
        self._waits_for_steps = False

    def _warn_of_missing_steps(self) -> None:
        """A plain HF Trainer, or a loop of one's own, would leave what moves by steps where it is, and nothing would show."""
        self._waits_for_steps = False
        logger.warning(
            "this model has a selection bias, coefficients or router state that move after each optimiser step, and its "
            "trainer has not called set_training_progress: they stay as they are. moesaic.train does it; HF Trainer needs "
            "callbacks=[RoutingStepCallback()]; for a loop of your own see docs/balance.md"
        )

    def _coefficients_of_layer(self, layer: int) -> dict[str, Tensor]:
        return self.moe_blocks()[layer].coefficients_by_loss()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        output_routing: bool = False,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        modality_ids: Tensor | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutput:
        """Logits and, with labels, the loss.

        Args:
            input_ids: (B, S) token ids; or give `inputs_embeds`.
            attention_mask: as for `MoesaicModel`.
            position_ids: (B, S).
            past_key_values: cache of earlier tokens.
            inputs_embeds: (B, S, D).
            labels: (B, S) ids to predict, shifted here; -100 is not predicted.
            use_cache: return a cache.
            output_router_logits: return router logits and `aux_losses`; the default is the config's.
            output_routing: return the whole routing.
            logits_to_keep: compute logits for the last so many positions, or the given ones; 0 for all.
            num_items_in_batch: number of predicted tokens over all micro-batches and ranks of the optimiser step. With
                it, the losses are this micro-batch's share of that mean: sums over micro-batches equal the loss of one
                large batch, balance losses included. HF Trainer passes it.
            modality_ids: (B, S) modality of each token, for routers and losses that look at it.
            task_ids: (B,) task of each sequence, likewise.
            **kwargs: passed to the decoder, its backbone and the loss function.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            output_routing=True,
            modality_ids=modality_ids,
            task_ids=task_ids,
            return_dict=True,
            **kwargs,
        )
        hidden = output.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep, :]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:, :]
        text_config = self.config.get_text_config()
        logits = family_of(text_config).finish_logits(self.lm_head(hidden), text_config)

        loss = aux_losses = None
        context: RoutingContext = output.routing
        if labels is not None or output_router_logits:
            weight_B = sequence_weights(labels, context, logits.device, num_items_in_batch, kwargs.get("shift_labels"))
            objective = BalanceObjective(self.balance, weight_B, self.coefficients)
            aux_losses = objective.by_name(context)
            if labels is not None:
                if self._waits_for_steps and self.training and torch.is_grad_enabled():
                    self._warn_of_missing_steps()
                loss = self.loss_function(
                    logits, labels, text_config.vocab_size, num_items_in_batch=num_items_in_batch, **kwargs
                )
                if self.training:
                    loss = objective.add_to(loss, aux_losses, context)
        return MoeCausalLMOutput(
            loss=loss,
            logits=logits,
            aux_losses=aux_losses,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            router_logits=output.router_logits,
            routing=context if output_routing else None,
        )
