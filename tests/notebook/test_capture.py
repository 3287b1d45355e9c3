"""What is taken from a namespace, and what is told when that is not clear."""

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, SequentialLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

from hybrid_magic import HybridMagicError
from hybrid_magic.notebook.arguments import read
from hybrid_magic.notebook.capture import Captured, capture


def make_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def make_loader() -> DataLoader:
    return DataLoader(TensorDataset(torch.zeros(8, 4), torch.zeros(8).long()), batch_size=4)


def take(namespace, line: str = "", *, bare: bool = True) -> Captured:
    return capture(read(line), namespace, bare=bare)


def refused(namespace, line: str = "", *, bare: bool = True) -> str:
    with pytest.raises(HybridMagicError) as caught:
        take(namespace, line, bare=bare)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def namespace():
    """Return a namespace with one model and one loader, and IPython's own names."""
    return {"_": make_net(), "Out": {}, "net": make_net(), "train_loader": make_loader()}


# -- model


def test_the_one_model_and_the_one_loader_are_taken_and_said(namespace):
    taken = take(namespace)
    assert taken.model is namespace["net"]
    assert taken.loader is namespace["train_loader"]
    assert (taken.optimizer, taken.val, taken.loss, taken.scheduler) == (None, None, None, None)
    assert taken.names == {"model": "net", "loader": "train_loader"}
    assert taken.found == ["model: net", "loader: train_loader"]


def test_what_is_named_is_taken_and_not_said_again(namespace):
    namespace["other"] = make_net()
    taken = take(namespace, "other train_loader")
    assert taken.model is namespace["other"]
    assert taken.found == []


def test_several_models_are_listed(namespace):
    namespace["encoder"] = nn.Linear(4, 4)
    assert refused(namespace) == (
        "the notebook holds 2 models: net (Sequential), encoder (Linear); wanted one; name it: "
        "%%hybrid_train MODEL LOADER"
    )


def test_a_part_of_a_model_is_not_another_model(namespace):
    namespace["head"] = namespace["net"][2]
    namespace["wrapped"] = nn.DataParallel(namespace["net"])
    taken = take(namespace)
    assert taken.model is namespace["wrapped"]


def test_one_model_under_two_names_is_one_model(namespace):
    namespace["model"] = namespace["net"]
    assert take(namespace).names["model"] == "net"


def test_a_frozen_teacher_a_criterion_and_a_class_are_no_candidates(namespace):
    namespace["teacher"] = make_net().requires_grad_(False)
    namespace["criterion"] = nn.CrossEntropyLoss()
    namespace["Net"] = nn.Sequential
    assert take(namespace).names["model"] == "net"


def test_no_model_is_told(namespace):
    del namespace["net"]
    assert refused(namespace).startswith("the notebook holds no model; wanted a torch.nn.Module ")


def test_models_that_are_all_frozen_are_named(namespace):
    namespace["net"].requires_grad_(False)
    assert refused(namespace).startswith("the notebook holds only frozen models (net); wanted ")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("nett", "the notebook has no nett; wanted the name of the model; did you mean net?"),
        ("resnet", "the notebook has no resnet; wanted the name of the model; "),
        (
            "net trainloader",
            (
                "the notebook has no trainloader; wanted the name of the loader; "
                "did you mean train_loader?"
            ),
        ),
        ("--val test", "the notebook has no test; wanted the name of the validation loader; run "),
        ("--optimizer optim", "the notebook has no optim; wanted the name of the optimizer; "),
        ("--loss loss_fn", "the notebook has no loss_fn; wanted the name of the criterion; "),
        ("--scheduler s", "the notebook has no s; wanted the name of the scheduler; "),
    ],
)
def test_a_name_that_the_notebook_has_not_is_told_with_the_nearest(namespace, line, told):
    assert refused(namespace, line).startswith(told)


# -- loader


def test_train_wins_among_several_loaders(namespace):
    namespace |= {"test_loader": make_loader(), "loader": make_loader()}
    assert take(namespace).names["loader"] == "train_loader"
    namespace["TrainBatches"] = namespace.pop("train_loader")
    assert take(namespace).names["loader"] == "TrainBatches"


def test_train_wins_under_a_second_name_too(namespace):
    loader = namespace.pop("train_loader")
    namespace |= {"loader": loader, "test_loader": make_loader(), "train_loader": loader}
    assert take(namespace).names["loader"] == "train_loader"


def test_several_loaders_without_train_are_listed(namespace):
    namespace |= {"one": namespace.pop("train_loader"), "two": make_loader()}
    assert refused(namespace) == (
        "the notebook holds 2 DataLoaders: one (DataLoader), two (DataLoader); wanted one; "
        "name it: %%hybrid_train MODEL LOADER"
    )


def test_several_training_loaders_are_listed_without_the_others(namespace):
    namespace |= {"train_small": make_loader(), "test_loader": make_loader()}
    assert "2 DataLoaders: train_loader (DataLoader), train_small (" in refused(namespace)


def test_the_loader_that_validates_is_not_trained_on(namespace):
    namespace |= {"loader": namespace.pop("train_loader"), "held_out": make_loader()}
    taken = take(namespace, "--val held_out")
    assert taken.loader is namespace["loader"]
    assert taken.val is namespace["held_out"]
    del namespace["loader"]
    namespace["same"] = namespace["held_out"]
    assert refused(namespace, "--val held_out").startswith(
        "the notebook holds no DataLoader but held_out, which validates; wanted one to train on; "
    )
    assert take(namespace, "net held_out --val held_out").loader is namespace["held_out"]


def test_no_loader_is_told(namespace):
    del namespace["train_loader"]
    assert refused(namespace) == (
        "the notebook holds no DataLoader; wanted one to train on; make it, or name any iterable "
        "of batches: %%hybrid_train MODEL LOADER"
    )


def test_any_iterable_is_taken_when_it_is_named(namespace):
    namespace["batches"] = [(torch.zeros(4, 4), torch.zeros(4).long())]
    assert take(namespace, "net batches").loader is namespace["batches"]
    assert take(namespace).loader is namespace["train_loader"]


def test_a_loader_may_be_named_alone(namespace):
    namespace["small"] = make_loader()
    taken = take(namespace, "small")
    assert taken.model is namespace["net"]
    assert taken.loader is namespace["small"]
    assert taken.found == ["model: net"]


# -- optimizer


def test_the_optimizer_that_holds_the_models_parameters_is_taken_and_said(namespace):
    namespace["opt"] = SGD(namespace["net"].parameters(), lr=0.1)
    namespace["same"] = namespace["opt"]
    taken = take(namespace)
    assert taken.optimizer is namespace["opt"]
    assert taken.names["optimizer"] == "opt"
    assert "optimizer: opt" in taken.found


def test_an_optimizer_of_some_of_the_parameters_is_taken(namespace):
    namespace["head_only"] = SGD(namespace["net"][2].parameters(), lr=0.1)
    assert take(namespace).optimizer is namespace["head_only"]


def test_an_optimizer_of_another_model_that_is_there_is_left_alone(namespace):
    namespace["critic"] = make_net()
    namespace["critic_opt"] = SGD(namespace["critic"].parameters(), lr=0.1)
    assert take(namespace, "net").optimizer is None
    namespace["opt"] = AdamW(namespace["net"].parameters())
    assert take(namespace, "net").optimizer is namespace["opt"]
    assert take(namespace, "critic").optimizer is namespace["critic_opt"]


def test_an_optimizer_made_before_the_model_was_made_anew_is_told(namespace):
    namespace["opt"] = SGD(namespace["net"].parameters(), lr=0.1)
    namespace["net"] = make_net()
    assert refused(namespace) == (
        "opt holds 4 of 4 parameters that are not net's; wanted an optimizer of this model; "
        "make it anew after the model: SGD(net.parameters(), ...)"
    )


def test_a_stale_optimizer_beside_a_good_one_is_left_alone(namespace):
    namespace["stale"] = SGD(make_net().parameters(), lr=0.1)
    namespace["opt"] = SGD(namespace["net"].parameters(), lr=0.1)
    assert take(namespace).optimizer is namespace["opt"]


def test_two_optimizers_of_the_model_are_listed(namespace):
    namespace["sgd"] = SGD(namespace["net"].parameters(), lr=0.1)
    namespace["adamw"] = AdamW(namespace["net"].parameters())
    assert refused(namespace) == (
        "the notebook holds 2 optimizers of net: sgd (SGD), adamw (AdamW); wanted one; name it: "
        "--optimizer NAME"
    )
    assert take(namespace, "--optimizer adamw").optimizer is namespace["adamw"]


# -- criterion and scheduler


@pytest.mark.parametrize("name", ["criterion", "loss_fn", "loss_func", "loss_function"])
def test_a_criterion_of_the_persons_own_is_known_by_its_name(namespace, name):
    namespace[name] = lambda output, y: (output - y).abs().mean()
    namespace["helper"] = lambda output, y: 0
    assert take(namespace, bare=True).loss is namespace[name]
    namespace["ce"] = nn.CrossEntropyLoss()
    assert f"2 criteria: ce (CrossEntropyLoss), {name} (function)" in refused(namespace)


def test_a_criterion_is_looked_for_only_by_a_bare_cell(namespace):
    namespace["criterion"] = nn.CrossEntropyLoss(label_smoothing=0.1)
    assert take(namespace, bare=True).loss is namespace["criterion"]
    assert take(namespace, bare=False).loss is None


def test_several_criteria_are_listed_and_one_may_be_any_function(namespace):
    namespace |= {"ce": nn.CrossEntropyLoss(), "mse": nn.MSELoss()}
    assert refused(namespace).startswith(
        "the notebook holds 2 criteria: ce (CrossEntropyLoss), mse "
    )
    assert take(namespace, bare=False).loss is None
    namespace["my_loss"] = lambda out, y: (out - y).abs().mean()
    assert take(namespace, "--loss my_loss").loss is namespace["my_loss"]


def test_only_a_scheduler_of_the_optimizer_in_use_is_taken(namespace):
    namespace["opt"] = SGD(namespace["net"].parameters(), lr=0.1)
    namespace["old"] = StepLR(SGD(make_net().parameters(), lr=0.1), 5)
    assert take(namespace).scheduler is None
    namespace["schedule"] = StepLR(namespace["opt"], 5)
    taken = take(namespace)
    assert taken.scheduler is namespace["schedule"]
    assert "scheduler: schedule" in taken.found
    assert (
        take(namespace, "--scheduler old").scheduler is namespace["old"]
    )  # for the engine to refuse


@pytest.mark.parametrize("outer", ["sequential", "chained"])
def test_the_parts_of_a_scheduler_are_not_other_schedulers(namespace, outer):
    opt = namespace["opt"] = SGD(namespace["net"].parameters(), lr=0.1)
    namespace["warm"], namespace["decay"] = ConstantLR(opt), StepLR(opt, 5)
    assert "2 schedulers: warm (ConstantLR), decay (StepLR)" in refused(namespace)
    parts = [namespace["warm"], namespace["decay"]]
    namespace["whole"] = (
        SequentialLR(opt, parts, milestones=[2])
        if outer == "sequential"
        else ChainedScheduler(parts)
    )
    assert take(namespace).scheduler is namespace["whole"]


def test_without_an_optimizer_no_scheduler_is_taken(namespace):
    namespace["stray"] = StepLR(SGD(make_net().parameters(), lr=0.1), 5)
    assert take(namespace).scheduler is None


def test_looking_changes_nothing(namespace):
    namespace["opt"] = SGD(namespace["net"].parameters(), lr=0.1)
    before = dict(namespace)
    take(namespace)
    assert namespace == before
