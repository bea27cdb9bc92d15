"""LoRA in a model: the layers that are named and no others, and PEFT's folders, written and read.

A folder that does not fit is refused, or at least warned about: an adapter that is passed over in silence is the
commonest of all complaints.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from hypothesis import strategies as st

from lora_bench import bounds
from lora_bench.adapter.peft_format import TENSORS
from lora_bench.conformance.check import WIDE, check
from lora_bench.conformance.misuse import refused
from lora_bench.conformance.outcome import NotOffered, Raised
from lora_bench.conformance.toy import HEAD, LINEARS, PROJECTIONS, Toy, adapters_of, drawn, written
from lora_bench.conformance.training import trained
from lora_bench.targets import ALL_LINEAR

if TYPE_CHECKING:
    from torch import Tensor

    from lora_bench.conformance.trial import Trial

Q_PROJS = (PROJECTIONS[0], PROJECTIONS[2])
READS = "model.reads_peft_folders"
claim = partial(check, draws={"dtype": WIDE}, effort=0.1)
of_folders = partial(claim, needs=("restore",), after=READS)


@claim("A name, or the end of a name in whole components, adapts those layers and no others.", needs=("adapt",))
def names_find_their_layers(trial: Trial) -> None:
    toy = Toy(trial)
    toy.judge_targets(["q_proj"], Q_PROJS)
    toy.judge_targets([PROJECTIONS[1]], PROJECTIONS[1:2])
    toy.judge_targets(["0.v_proj", "xq_proj"], (PROJECTIONS[1], PROJECTIONS[3]))


@claim("A string is a regular expression for whole names.", needs=("adapt",))
def a_pattern_is_of_whole_names(trial: Trial) -> None:
    toy = Toy(trial)
    toy.judge_targets(r"layers\.0\..+|lm", PROJECTIONS[:2])
    toy.judge_targets(r".*\.x?q_proj", (*Q_PROJS, PROJECTIONS[3]))


@claim('"all-linear" adapts every linear layer; of a plain torch model the head may be one of them.', needs=("adapt",))
def all_linear_is_every_linear(trial: Trial) -> None:
    Toy(trial).judge_targets(ALL_LINEAR, PROJECTIONS, optional=(HEAD,))


@claim("Targets of which none is in the model are refused.", needs=("adapt",))
def no_match_is_refused(trial: Trial) -> None:
    for targets in (["w_proj"], ["proj"], r"q_proj"):
        with refused(f"the targets {targets!r} match no layer, and were taken"):
            Toy(trial).adapted(targets)


@claim(
    "A fresh adapted model computes what the model does, and adds r (d_in + d_out) trained numbers a layer, no others.",
    needs=("adapt",),
)
def only_adapters_train(trial: Trial) -> None:
    toy = Toy(trial)
    model = toy.adapted(["q_proj"])
    found, wanted = trained(trial, model), toy.numbers(Q_PROJS)
    trial.require(found == wanted, f"{found} numbers train, wanted {wanted}")
    toy.judge(toy.run(model), {})


@claim("Every number that trains gets a gradient.", needs=("adapt",), after="model.only_adapters_train")
def every_adapter_learns(trial: Trial) -> None:
    toy = Toy(trial)
    model = toy.adapted(["q_proj", "v_proj"])
    toy.move(model)
    y = toy.run(model)
    trial.backward(y, drawn(torch.Generator().manual_seed(trial.case.seed), y))
    parameters = trial.parameters(model).items()
    learning = {name: own.numel() for name, own in parameters if own.grad is not None and own.grad.any()}
    for name in trial.trainable(model):
        trial.require(name in learning, f"{name} is said to train, and gets no gradient")
    found, wanted = sum(learning.values()), toy.numbers(PROJECTIONS[:3])
    trial.require(found == wanted, f"{found} numbers get a gradient, wanted {wanted}")


@claim("What is saved is PEFT's format, and what the model computes with.", needs=("adapt", "save"))
def writes_peft_folders(trial: Trial) -> None:
    toy = Toy(trial)
    model = toy.adapted(["q_proj"])
    toy.move(model)
    found = adapters_of(toy.saved(model))
    trial.require(set(found) == set(Q_PROJS), f"it saved adapters of {', '.join(found)}, wanted {', '.join(Q_PROJS)}")
    toy.judge(toy.run(model), found)


@claim(
    "A saved and restored adapter computes the same.",
    needs=("adapt", "save", "restore"),
    after="model.writes_peft_folders",
)
def survives_saving(trial: Trial) -> None:
    toy = Toy(trial)
    model = toy.adapted(["q_proj"])
    toy.move(model)
    with TemporaryDirectory() as folder:
        found = adapters_of(toy.saved(model, folder))
        toy.judge(toy.run(toy.restored(folder)), found)


@claim("A folder in PEFT's format gives the definition's output.", needs=("restore",), effort=0.3)
def reads_peft_folders(trial: Trial) -> None:
    toy = Toy(trial)
    adapters = toy.adapters(LINEARS)
    toy.judge(toy.run(toy.of_folder(adapters)), adapters)


@of_folders("Ranks and alphas that a pattern gives are honoured.")
def patterns_are_honoured(trial: Trial) -> None:
    toy = Toy(trial)
    adapters = toy.adapters(PROJECTIONS, varied=True)
    toy.judge(toy.run(toy.of_folder(adapters)), adapters)


@of_folders(
    "A bias of B is read, acts and is saved.",
    needs=("restore", "save"),
    draws={"dtype": WIDE, "lora_bias": st.just(True)},
)
def keeps_a_bias_of_b(trial: Trial) -> None:
    toy = Toy(trial)
    adapters = toy.adapters(PROJECTIONS)
    model = toy.of_folder(adapters)
    toy.judge(toy.run(model), adapters)
    toy.judge(toy.run(model), adapters_of(toy.saved(model)))


@of_folders("What was restored is saved as it was.", needs=("restore", "save"))
def saves_what_it_read(trial: Trial) -> None:
    toy = Toy(trial)
    adapters = toy.adapters(PROJECTIONS, varied=True)
    found = adapters_of(toy.saved(toy.of_folder(adapters)))
    trial.require(set(found) == set(adapters), f"it saved adapters of {', '.join(found)}, wanted {', '.join(adapters)}")
    for place, (spec, _) in adapters.items():
        for word in ("rank", "scaling"):
            now, before = getattr(found[place][0], word), getattr(spec, word)
            trial.require(now == before, f"the {word} of {place} became {now}, wanted {before}")
    toy.judge_saved(found, adapters)


@of_folders("Of a restored model the adapters train, all of them, or nothing does.")
def restored_trains_whole(trial: Trial) -> None:
    toy = Toy(trial)
    model = toy.of_folder(toy.adapters(PROJECTIONS))
    found, wanted = trained(trial, model), toy.numbers(PROJECTIONS)
    trial.require(found in (0, wanted), f"{found} numbers train, wanted {wanted} or none")


@of_folders("Adapters that are restored into two models do not meet.")
def models_do_not_share(trial: Trial) -> None:
    toy = Toy(trial)
    first, second = (toy.adapters(PROJECTIONS, seed=seed) for seed in range(2))
    one, other = toy.of_folder(first), toy.of_folder(second)
    toy.judge(toy.run(one), first)
    toy.judge(toy.run(other), second)


@of_folders("A folder that was written anew is read anew.")
def nothing_stale_is_restored(trial: Trial) -> None:
    toy = Toy(trial)
    with TemporaryDirectory() as folder:
        for seed in range(2):
            adapters = toy.adapters(PROJECTIONS, seed=seed)
            written(folder, adapters)
            toy.judge(toy.run(toy.restored(folder)), adapters)


@of_folders("Switched off, an adapted model is the model; on again, it is adapted.", needs=("restore", "enable"))
def off_is_the_model(trial: Trial) -> None:
    toy = Toy(trial)
    adapters = toy.adapters(PROJECTIONS)
    model = toy.of_folder(adapters)
    for on in (False, True):
        trial.ask("enable", model, on)
        toy.judge(toy.run(model), adapters if on else {})


@of_folders("The merged and unloaded model gives the definition's output.", needs=("restore", "merge_and_unload"))
def merges_to_the_definition(trial: Trial) -> None:
    toy = Toy(trial)
    adapters = toy.adapters(PROJECTIONS, varied=True)
    model = trial.ask("merge_and_unload", toy.of_folder(adapters))
    toy.judge(toy.run(model), adapters, bounds.merged)


@of_folders("What is saved while it is merged is the adapter, or it is refused.", needs=("restore", "save", "merge"))
def saves_the_adapter_while_merged(trial: Trial) -> None:
    toy = Toy(trial)
    adapters = toy.adapters(PROJECTIONS)
    model = toy.of_folder(adapters)
    if trial.merge(model) is not model:
        raise NotOffered("what merge returns is no adapted model")
    try:
        found = adapters_of(toy.saved(model))
    except Raised:
        return
    toy.judge_saved(found, adapters)


@of_folders(
    "To merge into a weight that has another place is refused, or leaves the other place as it is.",
    needs=("restore", "merge_and_unload"),
)
def a_tied_weight_keeps_its_other_place(trial: Trial) -> None:
    toy = Toy(trial, tied=True)
    adapters = toy.adapters([HEAD])
    for verb in filter(trial.subject.offers, ("merge", "merge_and_unload")):
        model = toy.of_folder(adapters)
        try:
            merged = trial.ask(verb, model)
        except Raised:
            continue
        toy.judge(toy.run(model if merged is None else merged), adapters, bounds.merged)


@of_folders(
    "Modules to save are restored, saved and unloaded with the adapter, or refused by name.", needs=("restore", "save")
)
def modules_to_save_survive(trial: Trial) -> None:
    toy, other = Toy(trial), Toy(trial)
    adapters = toy.adapters(PROJECTIONS)
    weight = drawn(torch.Generator().manual_seed(trial.case.seed + 1), toy.weights(HEAD)[0])
    try:
        model = toy.of_folder(adapters, modules_to_save=(HEAD,), saved={f"{HEAD}.weight": weight})
    except Raised as refused:
        if "modules_to_save" not in refused.because:
            raise
        raise NotOffered(refused.because) from None
    with torch.no_grad():
        other.plain.lm_head.weight.copy_(weight)
    other.judge(toy.run(model), adapters)
    found = toy.saved(model).saved
    trial.require(f"{HEAD}.weight" in found, f"{HEAD}.weight is to be saved, and was not")
    trial.near(f"{HEAD}.weight", found[f"{HEAD}.weight"], weight)
    if trial.subject.offers("merge_and_unload"):
        other.judge(toy.run(trial.ask("merge_and_unload", model)), adapters, bounds.merged)


@of_folders("Tensors of layers that the model has not are refused, or warned about.")
def foreign_keys_are_refused(trial: Trial) -> None:
    def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key.replace("layers.", "blocks."): value for key, value in state.items()}

    def more(state: dict[str, Tensor]) -> dict[str, Tensor]:
        own = {key: value for key, value in state.items() if PROJECTIONS[0] in key}
        return state | {key.replace("layers.0", "layers.2"): value.clone() for key, value in own.items()}

    Toy(trial).judge_refused("all its tensors are those of other layers", state=renamed)
    Toy(trial).judge_refused("some of its tensors are those of a layer that is not there", state=more)


@of_folders("A folder that lacks an A or a B is refused, or warned about.")
def missing_parts_are_refused(trial: Trial) -> None:
    def lacking(gone: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value for key, value in state.items() if not key.endswith(gone)}

    for part in ("lora_A", "lora_B"):
        gone = f"{PROJECTIONS[0]}.{part}.weight"
        Toy(trial).judge_refused(f"{gone} is missing", state=partial(lacking, gone))


@of_folders("Tensors that do not fit the configuration's rank, or the layer, are refused, or warned about.")
def other_shapes_are_refused(trial: Trial) -> None:
    def wider(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: torch.cat([value, value], 1) if "lora_A" in key else value for key, value in state.items()}

    Toy(trial).judge_refused("its rank is another than its tensors'", config={"r": trial.spec.rank + 1})
    Toy(trial).judge_refused("its A are those of wider layers", state=wider)


@of_folders("A file that was cut short is refused.")
def a_truncated_file_is_refused(trial: Trial) -> None:
    toy = Toy(trial)
    with TemporaryDirectory() as folder:
        written(folder, toy.adapters(PROJECTIONS))
        file = Path(folder) / TENSORS
        file.write_bytes(file.read_bytes()[:-1])
        with refused(f"{TENSORS} lacks its last byte, and was restored"):
            toy.restored(folder)


@of_folders("A field that is not known, or another method's name, is refused, or warned about.")
def unknown_fields_are_refused(trial: Trial) -> None:
    Toy(trial).judge_refused("its configuration has an unknown field", config={"use_acme_scaling": True})
    Toy(trial).judge_refused("its peft_type is LOHA", config={"peft_type": "LOHA"})
