"""What can be found wrong with a recipe's later sections before anything is trained."""

from collections.abc import Mapping, Sequence

from torch import nn

from converter.cost import count_macs, count_parameters, layer_calls
from converter.errors import StiefelError
from converter.factors import factored_layers
from converter.layers import Layer, find_layers, prepared
from converter.planning import check_fixed
from converter.prices import MacPrices, ParameterPrices, Prices
from converter.rank_plan import check_rank
from converter.ranks import (
    Budget,
    Energy,
    Fixed,
    Option,
    Policy,
    meet_budget,
    parse_rank,
    policy_rank,
)
from converter.requests import Request, read_requests
from export.bench import places
from stiefel.materials import calibration_images, example_of
from stiefel.recipe import ConvertSection, Recipe, TrainSection
from trainers.checks import check_batch_norm, check_factored, check_parts
from trainers.cuts import CutSettings, check_cuts, cut
from trainers.rank_schedule import RankSchedule, check_epochs, check_schedule, look
from trainers.rules import SSA
from trainers.settings import TrainSettings


def check(recipe: Recipe, model: nn.Module) -> None:
    """Refuse a recipe that would fail after the pretraining, whatever came of that.

    What depends on the trained weights or on measured time shows in its own time.

    Args:
        model: the recipe's, as built; it is only looked at.

    Raises:
        StiefelError: the model is factored already, or a section can't be carried out.
    """
    if layers := factored_layers(model):
        raise StiefelError(
            f"model: {next(iter(layers))} is factored already, and a recipe begins with a dense "
            "model; train this one further with stiefel train-local"
        )
    if recipe.pretrain:
        _check_training(recipe.pretrain, model, factors=False)
    factors = recipe.convert is not None and _check_convert(recipe.convert, model, recipe.seed)
    if recipe.train:
        _check_train(recipe.train, model, recipe.convert, factors)
    if recipe.bench:
        places(recipe.bench)


def _check_convert(section: ConvertSection, model: nn.Module, seed: int) -> bool:
    """Whether any layer may be factored; refuses what planning would, whatever the weights."""
    policy = parse_rank(section.rank)
    ready = prepared(model, share=True)
    found = find_layers(ready)
    requests = read_requests(found, policy, section.scheme, section.layers)
    layers = [layer for layer in found if layer.tied_to is None]
    _check_ranks(layers, requests, policy)
    if isinstance(policy, Budget) and policy.cost != "latency":
        prices: Prices = ParameterPrices(count_parameters(ready))
        if policy.cost == "macs":
            example = example_of(model)
            prices = MacPrices(count_macs(ready, example), layer_calls(ready, example))
        options = [_cheapest(layer, requests[layer.name], prices) for layer in layers]
        rest = prices.whole - sum(prices.current(layer) for layer in layers)
        meet_budget(options, policy, prices.whole, rest)
    if section.calibrate not in (None, "data"):
        calibration_images(
            section.model_copy(update={"calibrate_images": 1}), model, None, seed=seed
        )
    return any(request.keep is None for request in requests.values())


def _check_ranks(layers: Sequence[Layer], requests: Mapping[str, Request], policy: Policy) -> None:
    """Refuse a rank that a layer can't have, or a common one that no layer can."""
    for layer in layers:
        request = requests[layer.name]
        if request.forced and isinstance(request.policy, Fixed):
            for scheme in request.schemes:
                check_rank(layer.name, request.policy.rank, layer.highest_rank(scheme))
    if isinstance(policy, Fixed):
        check_fixed(policy, layers)


def _cheapest(layer: Layer, request: Request, prices: Prices) -> list[Option]:
    """A layer as it is and at its least; what either loses is not known yet."""
    options = [Option(None, None, prices.current(layer), 0.0)]
    for scheme in request.schemes if request.keep is None else ():
        rank = 1
        if request.forced and not isinstance(request.policy, Energy):
            rank = policy_rank(request.policy, min(layer.shape(scheme)), None)
        options.append(Option(scheme, rank, prices.factored(layer, scheme, rank), 0.0))
    return options


def _check_train(
    section: TrainSection, model: nn.Module, convert: ConvertSection | None, factors: bool
) -> None:
    rule = section.rule
    if isinstance(rule, SSA):
        rule.resolved(with_teacher=section.teach and convert is not None)
    if isinstance(rule, CutSettings):
        check_cuts(rule)
        if rule.blocks:
            cut(model, example_of(model), rule)
    if factors:
        _check_lower(section.ranks, parse_rank(convert.rank))
    if not factors:
        check_factored(model, rule)
    _check_training(section, model, factors)


def _check_lower(ranks: RankSchedule, converted: Policy) -> None:
    """Refuse a share of the parameters at the end that is above the one to begin with."""
    final = ranks.policy
    both = isinstance(final, Budget) and isinstance(converted, Budget)
    if both and final.cost == converted.cost and final.fraction > converted.fraction:
        raise StiefelError(
            f"train.ranks: final {final} is above convert's {converted}; a schedule only lowers "
            "ranks"
        )


def _check_training(section: TrainSettings, model: nn.Module, factors: bool) -> None:
    """Refuse what no rule can do; of ranks only the epochs where there are none to look at yet."""
    check_parts(section.batch_size, section.accumulate)
    if section.batch_norm != "frozen":
        check_batch_norm(model, section.batch_size // section.accumulate)
    if factors:
        check_epochs(section.ranks, section.epochs)
    else:
        check_schedule(section.ranks, section.epochs, look(model))
